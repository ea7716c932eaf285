"""The kernel of a fused cascade: called with a graph node's operands, it reads and writes them in place.

A cascade's tensor is an affine view of its operand (a head of a joint projection, a slice, a permutation): one stride for
each rank and an offset, which is all that a kernel needs of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch

from ..errors import ShapeError
from ..ir.expressions import symbol
from ..ir.fused_cascade import FusedCascade, TensorView
from ..ir.types import Size, TensorType, contiguous_stride
from ..passes.rewrite_cascade import Rewriting, rewrite
from .cascade_kernel import TORCH_DTYPES, CascadeKernel, prepare_cascade
from .tiles.errors import NotLowerable


class FusedKernel:
    """Callable on operands, as ``FusedCascade`` lists them. ``kernel`` is the cascade's own."""

    def __init__(self, fused: FusedCascade, kernel: CascadeKernel, bindings: Mapping[str, int]) -> None:
        self.fused, self.kernel = fused, kernel
        self.bindings = dict(bindings)
        self._shapes = [_numbers(result.shape, bindings) for result in fused.results]
        self._strides = [
            _numbers(result.stride or contiguous_stride(result.shape), bindings) for result in fused.results
        ]
        self._extents = {name: _number(size, bindings) for name, size in fused.sizes.items()}

    def __call__(
        self, operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The node's results, written into ``results`` if given. Raises ``ShapeError`` for operands that do not fit."""
        if len(operands) != len(self.fused.operands):
            raise ShapeError(f"{len(operands)} operands for {len(self.fused.operands)}", where="a fused cascade")
        if results is None:
            results = [
                torch.empty_strided(shape, stride, dtype=TORCH_DTYPES[kind.dtype])
                for kind, shape, stride in zip(self.fused.results, self._shapes, self._strides, strict=True)
            ]
        inputs = {view.tensor: self._view(view, operands[view.position]) for view in self.fused.inputs}
        outputs = {view.tensor: self._view(view, results[view.position]) for view in self.fused.outputs}
        self.kernel(inputs, outputs)
        return tuple(results)

    def _view(self, view: TensorView, base: torch.Tensor) -> torch.Tensor:
        """The cascade's tensor as a strided view of the operand."""
        strides, offset = rank_strides(view, base.stride(), self._extents)
        shape = [self._extents[rank.name] for rank in view.ranks]
        return torch.as_strided(base, shape, strides, base.storage_offset() + offset)


def rank_strides(view: TensorView, strides: Sequence[int], sizes: Mapping[str, int]) -> tuple[list[int], int]:
    """(elements between neighbours in each of the view's ranks, offset of its first element)."""
    steps = [0] * len(view.ranks)
    offset = 0
    for index, stride in zip(view.index, strides, strict=True):
        named = {s: sympy.Integer(sizes[s.name.strip("|")]) for s in index.free_symbols if s not in view.ranks}
        index = sympy.expand(index.xreplace(named))
        for position, rank in enumerate(view.ranks):
            steps[position] += int(index.coeff(rank)) * stride
        offset += int(index.xreplace(dict.fromkeys(view.ranks, sympy.Integer(0)))) * stride
    return steps, offset


def prepare_fused(
    fused: FusedCascade,
    rewriting: Rewriting | None = None,
    *,
    wide: frozenset[str] = frozenset(),
    bindings: Mapping[str, int] | None = None,
) -> FusedKernel:
    """The kernel of a fused cascade, compiled at its first call or by ``cascade_kernel.build([it.kernel])``. ``rewriting`` is ``rewrite(fused.cascade)`` if it is at hand; ``wide`` names tensors
    that must not be stored; ``bindings`` gives size symbols their values. Raises ``NotLowerable``."""
    rewriting = rewriting or rewrite(fused.cascade)
    bindings = bindings or {}
    sizes = {name: _number(size, bindings) for name, size in fused.sizes.items()}
    dtypes: dict[str, str] = {}
    units: dict[str, int | None] = {}
    shapes: dict[str, Sequence[int]] = {}
    for views, types in ((fused.inputs, fused.operands), (fused.outputs, fused.results)):
        for view in views:
            kind = types[view.position]
            if kind.dtype not in TORCH_DTYPES:
                raise NotLowerable(f"the element type {kind.dtype} of {view.tensor}", where=view.tensor)
            dtypes[view.tensor] = kind.dtype
            shapes[view.tensor] = [sizes[rank.name] for rank in view.ranks]
            units[view.tensor] = _unit(view, kind, sizes, bindings)
    kernel = prepare_cascade(
        rewriting,
        sizes,
        dtypes,
        outputs=[view.tensor for view in fused.outputs],
        units=units,
        shapes=shapes,
        wide=wide,
    )
    return FusedKernel(fused, kernel, bindings)


def _unit(view: TensorView, kind: TensorType, sizes: Mapping[str, int], bindings: Mapping[str, int]) -> int | None:
    """The position of the view's rank whose elements are neighbours: the last one with stride 1."""
    stride = _numbers(kind.stride or contiguous_stride(kind.shape), bindings)
    steps, _ = rank_strides(view, stride, sizes)
    found = [position for position, step in enumerate(steps) if step == 1]
    return found[-1] if found else None


def _numbers(sizes: Sequence[Size], bindings: Mapping[str, int]) -> list[int]:
    return [_number(size, bindings) for size in sizes]


def _number(size: Size, bindings: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    value = size.xreplace({symbol(name): sympy.Integer(number) for name, number in bindings.items()})
    if not value.is_Integer:
        raise NotLowerable(f"the size {size} is not known", where=str(size))
    return int(value)
