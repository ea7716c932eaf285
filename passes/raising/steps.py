"""What ops are lowered to before they become Einsums: leaves, maps, reductions and views.

Every other op is built of these. A value's element is an expression of its coordinates; what a view does to coordinates
and a map to elements is composed when Einsums are written (``emit``), so a view never is a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, overload

import sympy

from ...ir.types import Size
from .affine import join, split

#: Coordinates of an element: for each dimension those of its factors.
Index: TypeAlias = "list[tuple[sympy.Expr, ...]]"


@dataclass(eq=False)
class Value:
    """A tensor of the program. ``axes``: the factors of each dimension. ``hint`` is what its tensor will be called."""

    number: int
    shape: tuple[Size, ...]
    dtype: str
    axes: tuple[tuple[int, ...], ...]
    step: Step
    hint: str = ""
    line: int = 0

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Elements(Protocol):
    """What steps need while Einsums are written."""

    def element(self, value: Value, index: Index) -> sympy.Expr:
        """The value's element at these coordinates."""

    def factor_sizes(self, value: Value, dim: int) -> list[Size]:
        """Sizes of a dimension's factors, outer first."""

    def rank_size(self, rank: sympy.Symbol) -> Size: ...

    def size_of(self, rank: sympy.Symbol) -> sympy.Expr: ...


def coordinate(value: Value, dim: int, index: Index, at: Elements) -> sympy.Expr:
    """The coordinate along one dimension, from those of its factors."""
    return join(index[dim], at.factor_sizes(value, dim))


def factors(value: Value, dim: int, position: sympy.Expr, at: Elements) -> tuple[sympy.Expr, ...]:
    """The coordinates of a dimension's factors at ``position``. Raises ``NotAffine``."""
    sizes = at.factor_sizes(value, dim)
    free = {s: at.rank_size(s) for s in position.free_symbols if s.name[0].islower()}
    return split(position, sizes, free)


@dataclass(frozen=True, eq=False)
class Step:
    """How a value is made. ``operands`` are the values it reads."""

    operands: tuple[Value, ...]

    def element(self, value: Value, index: Index, at: Elements) -> sympy.Expr:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Leaf(Step):
    """A graph value that is taken as it is: an input, or the result of an op that is not raised."""

    node: str


@dataclass(frozen=True, eq=False)
class Map(Step):
    """``function(elements of the operands, coordinates)``; operands are broadcast as torch does."""

    function: Callable[[Sequence[sympy.Expr], Sequence[sympy.Expr]], sympy.Expr]

    def element(self, value: Value, index: Index, at: Elements) -> sympy.Expr:
        elements = [at.element(operand, broadcast(operand, index)) for operand in self.operands]
        return self.function(elements, _Coordinates(value, index, at))


@dataclass(frozen=True, eq=False)
class _Coordinates(Sequence[sympy.Expr]):
    """Coordinates along all dimensions of a value, worked out when they are asked for: few functions ask."""

    value: Value
    places: Index
    at: Elements

    def __len__(self) -> int:
        return self.value.ndim

    @overload
    def __getitem__(self, dim: int) -> sympy.Expr: ...
    @overload
    def __getitem__(self, dim: slice) -> list[sympy.Expr]: ...
    def __getitem__(self, dim: int | slice) -> sympy.Expr | list[sympy.Expr]:
        found = range(self.value.ndim)[dim]
        if isinstance(found, int):
            return coordinate(self.value, found, self.places, self.at)
        return [coordinate(self.value, each, self.places, self.at) for each in found]


def broadcast(operand: Value, index: Index) -> Index:
    """Where a broadcast operand is read: dimensions are aligned at the right, those of size 1 have no factors."""
    own = index[len(index) - operand.ndim :]
    return [() if not operand.axes[dim] else own[dim] for dim in range(operand.ndim)]


@dataclass(frozen=True, eq=False)
class Reduce(Step):
    """``kind`` (sum, max, min, prod) over dimensions ``dims`` of the operand; they are gone, or of size 1."""

    kind: str
    dims: tuple[int, ...]


class View(Step):
    """A value that shows its first operand's elements in other places."""

    def base_index(self, value: Value, index: Index, at: Elements) -> Index:
        raise NotImplementedError

    def element(self, value: Value, index: Index, at: Elements) -> sympy.Expr:
        return at.element(self.operands[0], self.base_index(value, index, at))


@dataclass(frozen=True, eq=False)
class Regroup(View):
    """reshape, view, squeeze, unsqueeze, flatten: the factors in the same order, grouped in other dimensions."""

    def base_index(self, value: Value, index: Index, at: Elements) -> Index:
        flat = [part for dim in index for part in dim]
        found: Index = []
        base = self.operands[0]
        for dim in range(base.ndim):
            count = len(at.factor_sizes(base, dim))
            found.append(tuple(flat[:count]))
            flat = flat[count:]
        assert not flat
        return found


@dataclass(frozen=True, eq=False)
class Permute(View):
    """``value`` dimension i is the operand's dimension ``dims[i]``."""

    dims: tuple[int, ...]

    def base_index(self, value: Value, index: Index, at: Elements) -> Index:
        found: Index = [()] * len(self.dims)
        for dim, own in zip(self.dims, index, strict=True):
            found[dim] = own
        return found


@dataclass(frozen=True, eq=False)
class Expand(View):
    """Dimensions of size 1 repeated, new ones in front."""

    def base_index(self, value: Value, index: Index, at: Elements) -> Index:
        return broadcast(self.operands[0], index)


@dataclass(frozen=True, eq=False)
class Slice(View):
    """Elements ``start + step*i`` of one dimension. A negative step flips."""

    dim: int
    start: int | sympy.Expr
    step: int

    def base_index(self, value: Value, index: Index, at: Elements) -> Index:
        base = self.operands[0]
        found = list(index)
        position = self.start + self.step * coordinate(value, self.dim, index, at)
        found[self.dim] = factors(base, self.dim, sympy.sympify(position), at)
        return found


@dataclass(frozen=True, eq=False)
class Window(Step):
    """Parts laid along a dimension (cat), or one part with a margin (pad): ``parts[i]`` begins at ``starts[i]``.

    What no part covers is ``fill``.
    """

    dim: int
    starts: tuple[int, ...]
    fill: sympy.Expr

    def element(self, value: Value, index: Index, at: Elements) -> sympy.Expr:
        from ...ir.cascade import GreaterEqual, Less, Where

        position = coordinate(value, self.dim, index, at)
        size = value.shape[self.dim]
        result: sympy.Expr = self.fill
        whole = list(zip(self.operands, self.starts, strict=True))
        covered = isinstance(size, int) and sum(int(part.shape[self.dim]) for part, _ in whole) == size
        places = self.part_indices(index, position, at)
        for number, ((part, start), own) in enumerate(zip(reversed(whole), reversed(places), strict=True)):
            element = at.element(part, own)
            end = start + int(part.shape[self.dim])
            if covered and number == 0:
                result = element
                continue
            if start > 0 and not covered:
                element = Where(GreaterEqual(position, start), element, self.fill)
            result = Where(Less(position, end), element, result)
        return result

    def part_indices(self, index: Index, position: sympy.Expr, at: Elements) -> list[Index]:
        """Where each part is read for an element that is at ``position`` of the dimension. Raises ``NotAffine``."""
        found: list[Index] = []
        for part, start in zip(self.operands, self.starts, strict=True):
            own = list(index)
            own[self.dim] = factors(part, self.dim, sympy.expand(position - start), at)
            found.append(own)
        return found
