"""The third IR form: a tile program, the loops of one kernel over tiles of its ranks.

A program names the tensors in memory that it reads and writes, and holds statements. A *loop* walks a rank tile by
tile (``grid``: independent tiles, any order; ``for``: in order; ``unroll``: in order, written out). Inside a loop of
step 1 the rank is one number; inside a loop of a longer step it is a range, and values carry it as a dimension. A rank
that no loop walks is whole: a dimension of its full size. A *value* ``P[m,n]`` is what one tile holds, its dimensions
in that order, the last contiguous; it lives from the statement that makes it to the end of the enclosing loop's body.

Expressions are those of the cascade language: an access reads a value if the program makes one of that name (its
indices are then exactly the value's), else a tensor in memory at affine indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from sympy.core.function import AppliedUndef

from .cascade import tensor_name

#: Kinds of loops and of tensors.
GRID, SEQUENTIAL, UNROLLED = "grid", "for", "unroll"
INPUT, OUTPUT, BUFFER = "input", "output", "buffer"
#: Element types a tensor in memory may have, and those a program may compute in.
DTYPES = ("f32", "f64", "bf16", "f16", "i64", "i32", "i16", "i8", "u8", "b1")
COMPUTE_DTYPES = ("f32", "f64")


@dataclass(frozen=True)
class Tensor:
    """A tensor in memory. ``unit`` is the position of the dimension whose elements are neighbours (stride 1), if known.

    ``role``: an input, an output, or a buffer between two programs of one launch list. ``ranks`` size the dimensions.
    """

    name: str
    ranks: tuple[sympy.Symbol, ...]
    dtype: str
    role: str
    unit: int | None = None


@dataclass(frozen=True)
class Load:
    """``load KT[d,n] = K[b,n,d]``: copy from memory into a value, converted and laid out as the value is."""

    target: AppliedUndef
    source: AppliedUndef


@dataclass(frozen=True)
class Map:
    """``map P[m,n] = exp(S[m,n] - M[m])``: each element by itself. A value that exists already is overwritten."""

    target: AppliedUndef
    body: sympy.Expr


@dataclass(frozen=True)
class Reduce:
    """``reduce R[m] = max[n] S[m,n]``; with ``accumulate`` (``max=``, ``sum=``) onto what R holds."""

    target: AppliedUndef
    reduction: str
    reduced: tuple[sympy.Symbol, ...]
    body: sympy.Expr
    accumulate: bool = False


@dataclass(frozen=True)
class Dot:
    """``dot S[m,n] = sum[d] Q[m,d] * KT[d,n]``: a matrix product of two accesses. The target's first dimensions are the
    left operand's, its last the right operand's. With ``accumulate`` (``sum=``) onto what the target holds."""

    target: AppliedUndef
    reduced: tuple[sympy.Symbol, ...]
    left: AppliedUndef
    right: AppliedUndef
    accumulate: bool = False


@dataclass(frozen=True)
class State:
    """``state M[m] = -inf``: a value that outlives the loops below it, and what it holds before them.

    A state outside of the grid's loops is each worker's own, and the sum of all workers' after them.
    """

    target: AppliedUndef
    body: sympy.Expr


@dataclass(frozen=True)
class Carry:
    """``carry M[m] = M_next[m]``: a state's new content; the expression may read the state itself at the same place."""

    target: AppliedUndef
    body: sympy.Expr


@dataclass(frozen=True)
class Store:
    """``store O[b,m,f] = A[m,f] / D[m]``: write a tensor in memory. The indices are ranks."""

    target: AppliedUndef
    body: sympy.Expr


@dataclass(frozen=True)
class Skip:
    """``skip unless n <= m``: go to the loop's next tile if the condition can hold nowhere in this one.

    ``skip unless n <= m while M[m] > -1e38``: that is right only if ``holds`` does everywhere at the loop's end. Where
    it does not, the tiles that were left out are walked after all others.
    """

    condition: sympy.Expr
    holds: sympy.Expr | None = None


@dataclass(frozen=True)
class Cases:
    """``if all n <= m { full } else { partial }``: ``full`` where the condition surely holds in all of the tile."""

    condition: sympy.Expr
    full: tuple[Statement, ...]
    partial: tuple[Statement, ...]


@dataclass(frozen=True)
class Loop:
    """``for n step 256 { body }``; with ``part p of 4096``, only over the p-th 4096 coordinates."""

    kind: str
    rank: sympy.Symbol
    step: int
    body: tuple[Statement, ...]
    part: sympy.Symbol | None = None
    length: int = 0


Statement: TypeAlias = "Load | Map | Reduce | Dot | State | Carry | Store | Skip | Cases | Loop"
#: Statements that make or change the value ``target``.
MAKERS = (Load, Map, Reduce, Dot, State, Carry)


@dataclass(frozen=True)
class Program:
    """One kernel. ``compute`` is the element type of its values. ``alias`` gives a rank the size of another."""

    name: str
    tensors: tuple[Tensor, ...]
    body: tuple[Statement, ...]
    compute: str = "f32"
    alias: tuple[tuple[sympy.Symbol, sympy.Symbol], ...] = ()

    @property
    def loops(self) -> tuple[Loop, ...]:
        return tuple(item for item in walk(self.body) if isinstance(item, Loop))

    @property
    def values(self) -> dict[str, tuple[sympy.Symbol, ...]]:
        """Every value the program makes -> its dimensions."""
        found: dict[str, tuple[sympy.Symbol, ...]] = {}
        for item in walk(self.body):
            if isinstance(item, MAKERS):
                found.setdefault(tensor_name(item.target), tuple(item.target.args))
        return found


def walk(body: tuple[Statement, ...]) -> Iterator[Statement]:
    """Every statement, outer before inner, in text order."""
    for item in body:
        yield item
        if isinstance(item, Loop):
            yield from walk(item.body)
        elif isinstance(item, Cases):
            yield from walk(item.full)
            yield from walk(item.partial)


def expressions(item: Statement) -> tuple[sympy.Expr, ...]:
    """What a statement reads, its nested statements aside."""
    if isinstance(item, Load):
        return (item.source,)
    if isinstance(item, Dot):
        return (item.left, item.right)
    if isinstance(item, Skip) and item.holds is not None:
        return (item.condition, item.holds)
    if isinstance(item, Skip | Cases):
        return (item.condition,)
    if isinstance(item, Loop):
        return ()
    return (item.body,)
