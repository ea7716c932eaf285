"""A cascade's Triton kernel as it is used on a GPU: compiled at its first call, and that call held to the Einsums as
they are written. What does not compile, or gives something else, runs as eager ops from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EffccError
from ..ir.fused_cascade import FusedCascade
from ..logs import logger
from ..passes.rewrite_cascade import Rewriting
from .eager_cascade import EagerCascade
from .fused_kernel import Kernel, PlacedKernel

if TYPE_CHECKING:
    from .triton_tiles.target import Target

_log = logger("cascades")
#: Largest error of a result, as a part of its largest magnitude, by the narrowest type of the operands: products take
#: operands rounded to it (float32 may be rounded to 11 bits), and eager rounds what lies between.
_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 0.005, torch.float64: 1e-9}


class GpuCascade:
    """Callable on operands, as ``PlacedKernel``. ``why``: the reason if it runs as eager ops."""

    def __init__(self, fused: FusedCascade, rewriting: Rewriting | None, target: Target) -> None:
        self.fused, self.why = fused, ""
        self._held = False
        self.placed: PlacedKernel[Any]
        from .triton_tiles.settle import placed

        try:
            self.placed = placed(fused, rewriting, target, wide=frozenset(fused.wide))
        except EffccError as error:
            self.placed = self._eager()
            self._give_up(error.message)

    def __call__(self, operands: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if self._held:
            return self.placed(operands)
        try:
            found = self.placed(operands)
        except (EffccError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return self._instead(operands, str(error))
        if operands[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return found
        try:
            expected = self._eager()(operands)
        except torch.OutOfMemoryError:
            # The Einsums need the tensors that the kernel does without. Nothing speaks against the kernel.
            _log.info("%s is not held to eager ops: they do not fit", self.fused.results)
            self._held = True
            return found
        narrowest = min((each.dtype for each in operands if each.is_floating_point()), key=lambda d: d.itemsize)
        for own, wanted in zip(found, expected, strict=True):
            error_of_it = _error(own, wanted)
            if not error_of_it <= _TOLERANCE.get(narrowest, 0.05):
                return self._instead(operands, f"a result of its first call is off by {error_of_it:.2g} of its size")
        self._held = True
        return found

    def _eager(self) -> PlacedKernel[Kernel]:
        sizes = {name: int(size) for name, size in self.fused.sizes.items()}
        return PlacedKernel(self.fused, EagerCascade(self.fused.cascade, sizes), {})

    def _instead(self, operands: Sequence[torch.Tensor], why: str) -> tuple[torch.Tensor, ...]:
        self.placed = self._eager()
        self._give_up(why)
        return self.placed(operands)

    def _give_up(self, why: str) -> None:
        self.why, self._held = why, True
        warnings.warn(f"effcc: a fused kernel runs as eager ops: {why}", RuntimeWarning, stacklevel=2)


def _error(own: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest error where both are finite, as a part of the largest magnitude; infinite if one is finite only."""
    both = own.isfinite() & wanted.isfinite()
    if not torch.equal(own.isfinite(), wanted.isfinite()):
        return float("inf")
    difference = torch.where(both, own.double() - wanted.double(), 0.0).abs()
    size = torch.where(both, wanted.double(), 0.0).abs()
    return float(difference.max() / size.max().clamp(min=1e-30)) if own.numel() else 0.0
