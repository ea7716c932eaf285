"""Inductor's settings while effcc compiles."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config

from .code_cache import remembered_toolchain


def graph_settings() -> contextlib.AbstractContextManager[Any]:
    """How AOTAutograd is run. Its own cache would hand back code that Inductor, not effcc, compiled for the same graph;
    and the backward is compiled at once, while the forward's C++ kernels are still on their way."""
    import torch._functorch.config as functorch_config

    return functorch_config.patch(  # type: ignore[no-any-return]
        enable_autograd_cache=False, force_non_lazy_backward_lowering=True
    )


def region_settings() -> contextlib.AbstractContextManager[Any]:
    """How regions are compiled. The processor's own flags say which vector instructions it has; building and loading a
    probe for each, as Inductor does by default, takes seconds of a cold start."""
    trusted = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
    # A region has no joint graph; without what works on those its code is found in the cache with any budget.
    settings: dict[str, Any] = {"custom_partitioner_fn": None, "joint_custom_pre_pass": None}
    stack = contextlib.ExitStack()
    stack.enter_context(inductor_settings({"cpp.vec_isa_ok": True, **settings} if trusted else settings))
    stack.enter_context(remembered_toolchain())
    return stack


def without_code_cache() -> contextlib.AbstractContextManager[Any]:
    """Code generated inside is neither looked up nor kept."""
    return inductor_settings({"fx_graph_cache": False, "fx_graph_remote_cache": False})


@contextlib.contextmanager
def cache_directory(path: Path | None) -> Iterator[None]:
    """Inductor's code cache under ``path`` while inside; None leaves it where it is."""
    if path is None:
        yield
        return
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def inductor_settings(settings: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    return inductor_config.patch(settings)  # type: ignore[no-any-return]


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's settings of a ``torch.compile`` mode such as ``reduce-overhead``."""
    if not mode or mode == "default":
        return {}
    return dict(torch._inductor.list_mode_options(mode))


def cudagraphs_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether this compilation is to be recorded as a CUDA graph (``mode="reduce-overhead"``)."""
    return bool(kwargs.get("cudagraphs") or False)
