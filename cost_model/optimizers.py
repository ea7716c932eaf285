"""What an optimizer's step costs and what it allocates meanwhile.

From reading ``torch.optim`` 2.13: on CUDA the default ``foreach`` implementation makes lists of temporaries for all
parameters at once; on CPU parameters are updated one after another.
"""

from __future__ import annotations

from collections.abc import Sequence

from .devices import Device
from .roofline import Cost, bandwidth

#: Temporaries of parameter size: live at once for one parameter (CPU), and for all parameters (foreach). Adam's
#: denominator is a square root and its quotient by the bias correction; foreach divides in place.
_TEMPORARIES = {
    "adam": (2, 1),
    "adamw": (2, 1),
    "nadam": (2, 1),
    "radam": (2, 1),
    "adamax": (2, 1),
    "adagrad": (1, 1),
    "adadelta": (2, 2),
    "rmsprop": (1, 1),
    "sgd": (0, 0),
}


def optimizer_workspace(optimizer: str, parameter_bytes: Sequence[int], device: Device) -> int:
    """Bytes that a step of the optimizer allocates and gives back. 0 for an optimizer that is not known."""
    single, together = _TEMPORARIES.get(optimizer.lower(), (0, 0))
    if device.kind == "cpu":
        return single * max(parameter_bytes, default=0)
    return together * sum(parameter_bytes)


def optimizer_cost(parameters: int, gradients: int, state: int, device: Device) -> Cost:
    """Cost of a step: parameters and state are read and written, gradients read; all memory-bound."""
    moved = 2 * parameters + gradients + 2 * state
    flop = (parameters + gradients + state) // 4
    seconds = moved / bandwidth(moved, "pointwise", device) + device.launch.value
    return Cost(flop, moved, seconds, "memory")
