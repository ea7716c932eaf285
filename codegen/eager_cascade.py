"""A cascade without a kernel: its Einsums as written, one after the other, where the compiler gives none."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..ir.cascade import Cascade
from .einsums import Values, run_cascade
from .integers import compared_integers


class EagerCascade:
    """Callable on a cascade's tensors by name, as its kernel. ``sizes``: every rank and named constant.

    Computes in float32 or better as kernels do; in float64 where integers are compared that float32 does not hold.
    """

    def __init__(self, cascade: Cascade, sizes: Mapping[str, int]) -> None:
        self.cascade, self.sizes = cascade, dict(sizes)

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        whole = [name for name, tensor in inputs.items() if tensor.dtype in (torch.int32, torch.int64)]
        exact = compared_integers(self.cascade, whole)
        given = {name: tensor.double() if name in exact else tensor for name, tensor in inputs.items()}
        found = run_cascade(self.cascade, Values(given, sizes=self.sizes, extents=self.sizes))
        if out is None:
            return {name: found[name] for name in self.cascade.outputs}
        return {name: tensor.copy_(found[name]) for name, tensor in out.items()}
