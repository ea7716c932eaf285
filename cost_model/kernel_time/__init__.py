"""Times of GPU kernels (f32, eager PyTorch) from sizes and published figures of the device.

``rows`` reads what is asked, ``gpus`` what is known of devices; ``core_gemm`` and ``core_memory`` are the analytic
core, ``power`` the clock that a board sustains, ``features`` and ``trees`` the learned correction, ``model`` joins them
and gives bands, ``adaptation`` moves predictions by a few measured rows; ``model_file`` is the file, ``training`` and
``fitting`` make it.
"""
