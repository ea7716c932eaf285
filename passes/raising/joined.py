"""Ops on tensors that were joined from a large part and single columns: done on the parts, and joined again.

A learned sink is one more column of the scores: ``softmax(cat([S, sink]))[..., :-1]``. Taken part by part, the maximum
is ``max(max_n S, sink)`` and the sum ``sum_n exp(S - M) + exp(sink - M)``, and no tensor of all columns is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from ...ir.monoid import join
from ...ir.types import Size
from .sizes import equal
from .steps import Value, Window

if TYPE_CHECKING:
    from .program import Program

#: More parts than this stay one tensor.
_MAX_PARTS = 4


@dataclass(frozen=True)
class Joined:
    """``parts[i]`` begins at ``starts[i]`` of dimension ``dim``; together they are all of it."""

    dim: int
    parts: tuple[Value, ...]
    starts: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        return [int(part.shape[self.dim]) for part in self.parts]


def joined(value: Value) -> Joined | None:
    """The parts of a value, if all but one are single columns."""
    step = value.step
    if not isinstance(step, Window) or not 2 <= len(step.operands) <= _MAX_PARTS:
        return None
    found = Joined(step.dim, step.operands, step.starts)
    lengths = found.lengths
    covered = sum(lengths) == value.shape[step.dim]
    return found if covered and sum(length > 1 for length in lengths) <= 1 else None


def map_parts(
    program: Program,
    function: Callable[[Sequence[sympy.Expr], Sequence[sympy.Expr]], sympy.Expr],
    shape: Sequence[Size],
    dtype: str | None,
    operands: Sequence[Value],
) -> Value | None:
    """A map of operands of which one is joined, part by part; None if none is."""
    for operand in operands:
        whole = joined(operand)
        if whole is not None:
            break
    else:
        return None
    dim = len(shape) - operand.ndim + whole.dim
    results = []
    for number, (start, length) in enumerate(zip(whole.starts, whole.lengths, strict=True)):
        parts = [_part(program, other, len(shape), dim, whole, number) for other in operands]
        own = list(shape)
        own[dim] = length
        results.append(program.generate(_shifted(function, dim, start), own, dtype, *parts))
    return program.window(results, dim, whole.starts, int(sum(whole.lengths)), sympy.Integer(0))


def _part(program: Program, value: Value, ndim: int, dim: int, whole: Joined, number: int) -> Value:
    """What part ``number`` of the result reads of an operand."""
    own = dim - (ndim - value.ndim)
    if own < 0 or equal(value.shape[own], 1):
        return value
    same = joined(value)
    if same is not None and same.dim == own and same.starts == whole.starts:
        return same.parts[number]
    return program.slice(value, own, whole.starts[number], whole.lengths[number])


def _shifted(
    function: Callable[[Sequence[sympy.Expr], Sequence[sympy.Expr]], sympy.Expr], dim: int, start: int
) -> Callable[[Sequence[sympy.Expr], Sequence[sympy.Expr]], sympy.Expr]:
    def call(elements: Sequence[sympy.Expr], at: Sequence[sympy.Expr]) -> sympy.Expr:
        places = [place + start if number == dim else place for number, place in enumerate(at)]
        return function(elements, places)

    return call


def reduce_parts(program: Program, kind: str, value: Value, dims: Sequence[int], keepdim: bool) -> Value | None:
    """A reduction along the dimension that is joined: the parts' reductions together."""
    whole = joined(value)
    if whole is None or whole.dim not in dims:
        return None
    parts = [program.reduce(kind, part, dims, keepdim) for part in whole.parts]
    result = parts[0]
    for part in parts[1:]:
        result = program.map(lambda a, b: join(kind, a, b), result, part)
    return result


def slice_parts(program: Program, value: Value, dim: int, start: int, length: Size) -> Value | None:
    """A slice that lies in one part."""
    whole = joined(value)
    if whole is None or whole.dim != dim or not isinstance(length, int):
        return None
    for part, begin, own in zip(whole.parts, whole.starts, whole.lengths, strict=True):
        if begin <= start and start + length <= begin + own:
            return program.slice(part, dim, start - begin, length)
    return None
