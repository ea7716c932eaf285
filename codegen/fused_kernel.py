"""The kernel of a fused cascade: called with a graph node's operands, it reads and writes them in place.

A cascade's tensor is an affine view of its operand (a head of a joint projection, a slice, a permutation): one stride
for each rank and an offset, which is all that a kernel needs of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import sympy
import torch

from ..errors import ShapeError
from ..ir.expressions import symbol
from ..ir.fused_cascade import FusedCascade, TensorView
from ..ir.types import Size, TensorType, contiguous_stride
from ..passes.rewrite_cascade import Rewriting, rewrite
from .cascade_kernel import TORCH_DTYPES, CascadeKernel, prepare_cascade
from .tiles.errors import NotLowerable
from .tiles.roles import Caches


class Kernel(Protocol):
    """A cascade's kernel for some processor, called with its tensors by name."""

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]: ...


K = TypeVar("K", bound=Kernel)


class PlacedKernel(Generic[K]):
    """Callable on operands, as ``FusedCascade`` lists them. ``kernel`` is the cascade's own."""

    def __init__(self, fused: FusedCascade, kernel: K, bindings: Mapping[str, int]) -> None:
        self.fused, self.kernel = fused, kernel
        self.bindings = dict(bindings)
        self._shapes = [_numbers(result.shape, bindings) for result in fused.results]
        self._strides = [
            _numbers(result.stride or contiguous_stride(result.shape), bindings) for result in fused.results
        ]
        self.sizes = {name: _number(size, bindings) for name, size in fused.sizes.items()}
        self._inputs = [(view, placement(view, self.sizes, bindings)) for view in fused.inputs]
        self._outputs = [(view, placement(view, self.sizes, bindings)) for view in fused.outputs]

    def __call__(
        self, operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The node's results, written into ``results`` if given. Raises ``ShapeError`` for operands that do not fit."""
        if len(operands) != len(self.fused.operands):
            raise ShapeError(f"{len(operands)} operands for {len(self.fused.operands)}", where="a fused cascade")
        if results is None:
            results = [
                torch.empty_strided(shape, stride, dtype=TORCH_DTYPES[kind.dtype], device=operands[0].device)
                for kind, shape, stride in zip(self.fused.results, self._shapes, self._strides, strict=True)
            ]
        inputs = {view.tensor: place.view(operands[view.position]) for view, place in self._inputs}
        outputs = {view.tensor: place.view(results[view.position]) for view, place in self._outputs}
        self.kernel(inputs, outputs)
        return tuple(results)


#: In C++.
FusedKernel: TypeAlias = PlacedKernel[CascadeKernel]


@dataclass(frozen=True)
class Placement:
    """A cascade's tensor in its operand: ``steps[dimension][rank]`` and ``starts[dimension]`` make up the
    index in that dimension of the operand."""

    shape: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    def strides(self, base: Sequence[int]) -> tuple[int, ...]:
        """Elements between neighbours in each rank, for an operand with the strides ``base``."""
        columns = range(len(self.shape))
        return tuple(sum(row[c] * stride for row, stride in zip(self.steps, base, strict=True)) for c in columns)

    def view(self, operand: torch.Tensor) -> torch.Tensor:
        """The tensor as a strided view."""
        base = operand.stride()
        offset = sum(start * stride for start, stride in zip(self.starts, base, strict=True))
        return torch.as_strided(operand, self.shape, self.strides(base), operand.storage_offset() + offset)


def placement(view: TensorView, sizes: Mapping[str, int], bindings: Mapping[str, int]) -> Placement:
    """Read a view's affine indices. Its sizes are its own where it is read at more than plain ranks."""
    shape = _numbers(view.sizes, bindings) if view.sizes else [sizes[rank.name] for rank in view.ranks]
    steps, starts = [], []
    for index in view.index:
        named = {s: sympy.Integer(sizes[s.name.strip("|")]) for s in index.free_symbols if s not in view.ranks}
        plain = sympy.expand(index.xreplace(named))
        steps.append(tuple(int(plain.coeff(rank)) for rank in view.ranks))
        starts.append(int(plain.xreplace(dict.fromkeys(view.ranks, sympy.Integer(0)))))
    return Placement(tuple(shape), tuple(steps), tuple(starts))


def prepare_fused(
    fused: FusedCascade,
    rewriting: Rewriting | None = None,
    *,
    wide: frozenset[str] = frozenset(),
    bindings: Mapping[str, int] | None = None,
) -> FusedKernel:
    """The C++ kernel of a fused cascade, compiled at its first call or by ``cascade_kernel.build([it.kernel])``.

    ``rewriting`` is ``rewrite(fused.cascade)`` if it is at hand; ``wide`` names tensors that must not be stored;
    ``bindings`` gives size symbols their values. Raises ``NotLowerable``."""
    settings = schedule_settings(fused.schedule)
    return prepare_with(prepare_cascade, fused, rewriting, wide=wide, bindings=bindings, **settings)


def schedule_settings(schedule: Mapping[str, int]) -> dict[str, Any]:
    """A chosen schedule as settings of ``prepare_cascade``; what it leaves open stays with the generator's rules."""
    if not schedule:
        return {}
    tile = (schedule["rows"], schedule["streamed"]) if {"rows", "streamed"} <= schedule.keys() else None
    parts = schedule.get("parts", 0)
    return {
        "caches": replace(Caches.of_this_machine(), tile=tile, parts=parts if parts > 1 else 0),
        "crossing": bool(schedule.get("crossing", 1)),
        "splitting": parts != 1,
    }


def prepare_with(
    prepare: Callable[..., K],
    fused: FusedCascade,
    rewriting: Rewriting | None = None,
    *,
    wide: frozenset[str] = frozenset(),
    bindings: Mapping[str, int] | None = None,
    **settings: Any,
) -> PlacedKernel[K]:
    """The kernel that ``prepare`` makes of a cascade, called as ``prepare_cascade`` is, with further ``settings``."""
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
            place = placement(view, sizes, bindings)
            shapes[view.tensor] = place.shape
            units[view.tensor] = _unit(place, kind, bindings)
    kernel = prepare(
        rewriting,
        sizes,
        dtypes,
        outputs=[view.tensor for view in fused.outputs],
        units=units,
        shapes=shapes,
        wide=wide,
        **settings,
    )
    return PlacedKernel(fused, kernel, bindings)


def _unit(place: Placement, kind: TensorType, bindings: Mapping[str, int]) -> int | None:
    """The position of the view's rank whose elements are neighbours: the last one with stride 1."""
    strides = place.strides(_numbers(kind.stride or contiguous_stride(kind.shape), bindings))
    found = [position for position, step in enumerate(strides) if step == 1]
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
