"""What ``effcc plan`` is asked for, and what of it can be refused at once."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from .errors import OptionError
from .options import parse_bytes
from .plan_streams import MOST_STREAMS
from .summary import device_named

#: What is done to every captured graph before it is planned.
PIPELINE = "normalize,saved-layouts,repeated-structure,regions,schedule"
#: The same where layers may differ in what they save: they are not folded into one.
BUDGET_PIPELINE = "normalize,regions,schedule"

#: Names of the floating-point types that ``dtype`` may convert a model to, with torch's own.
DTYPES = {
    "f64": "f64", "f32": "f32", "bf16": "bf16", "f16": "f16",
    "float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16",
}  # fmt: skip


@dataclass(frozen=True)
class PlanRequest:
    """What ``effcc plan`` is asked for. ``model``: ``FILE.py[:name]`` or ``FILE.mlir``; ``memory_budget`` in bytes."""

    model: str
    train: bool = False
    optimizer: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    memory_budget: int | None = None
    #: Under a budget, values may be swapped to the host.
    swap: bool = False
    #: Also the curve of time against memory.
    pareto: bool = False
    #: Also which dependent reductions could be one kernel.
    cascades: bool = False
    #: Fuse cascades as ``torch.compile`` does.
    fuse: bool = True
    #: Most kernels at once, each on a stream of its own; plans for GPUs only.
    streams: int = 1
    dynamic: bool = False
    pipeline: str = PIPELINE
    dump_dir: Path | None = None
    verify: bool = True


def budget_bytes(given: int | str | None, device: str, option: str = "memory_budget") -> int | None:
    """A budget in bytes; ``"auto"`` is the device's memory. Raises OptionError, DeviceError."""
    if given == "auto":
        return int(device_named(device).memory)
    return None if given is None else parse_bytes(given, option=option)


def check_options(request: PlanRequest) -> None:
    """What can be refused before the model is built, which may take a while. Raises OptionError."""
    if not 1 <= request.streams <= MOST_STREAMS:
        raise OptionError(f"--streams {request.streams} is out of range", remedy=f"give 1 to {MOST_STREAMS}")
    if request.optimizer is not None and not request.train:
        raise OptionError("--optimizer without --train", remedy="add --train: only a training step has an optimizer")
    if request.dtype is not None and request.dtype.removeprefix("torch.") not in DTYPES:
        raise OptionError(
            f"dtype {request.dtype!r} is not understood", remedy=f"one of {', '.join(dict.fromkeys(DTYPES.values()))}"
        )
    if request.optimizer is not None:
        from .frontend.state import OPTIMIZERS

        name = request.optimizer.lower().replace("-", "_")
        if name not in OPTIMIZERS:
            close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise OptionError(
                f"unknown optimizer {request.optimizer!r}", remedy=f"{hint}known optimizers: {', '.join(OPTIMIZERS)}"
            )
