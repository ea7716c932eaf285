"""The second IR form: a cascade of extended Einsums.

An extended Einsum maps a scalar expression over operands indexed by named *ranks* and reduces some ranks with a
semiring operation (TeAAL, MICRO'23; FuseMax, MICRO'24). Expressions are sympy; a tensor access ``QK[m,n]`` is the
applied function ``QK(m, n)``, a rank is an integer symbol, and its size ``|n|`` a positive integer symbol. Functions
for which sympy would apply simplifications that are wrong for infinities (``where``, comparisons, ``max``) are our own
classes, which sympy leaves as they are written.

A tensor may be *iterative* in one rank: ``RM[m,c+1] = max(RM[m,c], LM[m,c])`` with ``RM[m,0] = -inf``. Such a tensor
has ``|c| + 1`` elements in that position, and its last one is read as ``RM[m,|c|]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from ..errors import CascadeError

Expression = sympy.Expr

#: Semiring reductions and the value that changes nothing.
IDENTITY: dict[str, sympy.Expr] = {
    "sum": sympy.Integer(0),
    "prod": sympy.Integer(1),
    "max": -sympy.oo,
    "min": sympy.oo,
}


class CascadeFunction(sympy.Function):  # type: ignore[misc]  # sympy has no type hints
    """A function of the cascade language. Its value is an extended real (an infinity is possible)."""

    def _eval_is_extended_real(self) -> bool:
        return True


class Where(CascadeFunction):
    """``where(c, a, b)``: a where c is not 0, else b. The branch not taken contributes nothing, not even a NaN."""

    nargs = 3


class Maximum(CascadeFunction):
    """``max(a, b)`` of two scalars."""

    nargs = 2


class Minimum(CascadeFunction):
    """``min(a, b)`` of two scalars."""

    nargs = 2


class Relu(CascadeFunction):
    """``max(x, 0)``."""

    nargs = 1


class Sigmoid(CascadeFunction):
    """``1 / (1 + exp(-x))``."""

    nargs = 1


class Round(CascadeFunction):
    """The nearest integer, ties to even."""

    nargs = 1


class Less(CascadeFunction):
    """``a < b`` as the number 1 or 0, like the five classes below."""

    nargs = 2


class LessEqual(CascadeFunction):
    """``a <= b``."""

    nargs = 2


class Greater(CascadeFunction):
    """``a > b``."""

    nargs = 2


class GreaterEqual(CascadeFunction):
    """``a >= b``."""

    nargs = 2


class Equal(CascadeFunction):
    """``a == b``."""

    nargs = 2


class NotEqual(CascadeFunction):
    """``a != b``."""

    nargs = 2


def is_literal(e: sympy.Expr) -> bool:
    """Whether an expression is a number as it stands: functions of the language are not evaluated, not even those of
    numbers."""
    return bool(e.is_number) and not e.has(CascadeFunction)


#: Text of a comparison -> its class.
COMPARISONS: dict[str, type[CascadeFunction]] = {
    "<": Less,
    "<=": LessEqual,
    ">": Greater,
    ">=": GreaterEqual,
    "==": Equal,
    "!=": NotEqual,
}


@cache
def rank(name: str) -> sympy.Symbol:
    """The index variable of a rank."""
    return sympy.Symbol(name, integer=True)


@cache
def size(name: str) -> sympy.Symbol:
    """The number of coordinates of a rank, ``|name|``."""
    return sympy.Symbol(f"|{name}|", integer=True, positive=True)


@cache
def constant(name: str) -> sympy.Symbol:
    """A named positive integer such as a block size, ``B`` in ``K[c*B+j,d]``."""
    return sympy.Symbol(name, integer=True, positive=True)


def is_size(symbol: sympy.Symbol) -> bool:
    return bool(symbol.name.startswith("|"))


def is_rank(symbol: sympy.Symbol) -> bool:
    return bool(symbol == rank(symbol.name))


def access(name: str, indices: Iterable[sympy.Expr]) -> sympy.Expr:
    """``name[indices]`` as an expression."""
    return _tensor(name)(*indices)


@cache
def _tensor(name: str) -> Any:
    return sympy.Function(name, real=True)


def accesses(expression: sympy.Expr) -> list[AppliedUndef]:
    """The tensor accesses of an expression, in a fixed order."""
    return list(_accesses(expression))


@lru_cache(maxsize=1 << 16)
def _accesses(expression: sympy.Expr) -> tuple[AppliedUndef, ...]:
    """Passes ask for those of the same bodies again and again."""
    found = expression.atoms(AppliedUndef)
    return tuple(sorted(found, key=sympy.default_sort_key) if len(found) > 1 else found)


def tensor_name(item: AppliedUndef) -> str:
    return str(item.func.__name__)


@cache
def ranks_of(expression: sympy.Expr) -> frozenset[sympy.Symbol]:
    """The rank variables that occur in an expression (in an index or as a number)."""
    return frozenset(symbol for symbol in expression.free_symbols if is_rank(symbol))


@dataclass(frozen=True)
class Einsum:
    """``output[indices] = reduction[reduced] body``.

    ``indices`` are rank variables, except that an iterative tensor is written at ``c + 1`` (its step) and at a number
    (its start). ``reduction`` is sum, max, min, prod or None for a plain map. ``line`` is the line of the text, 0 for
    none.
    """

    output: str
    indices: tuple[sympy.Expr, ...]
    body: sympy.Expr
    reduction: str | None = None
    reduced: tuple[sympy.Symbol, ...] = ()
    line: int = field(default=0, compare=False)

    @cached_property
    def kept(self) -> tuple[sympy.Symbol, ...]:
        """Rank variables of the output, in the order of its indices."""
        return tuple(next(iter(ranks_of(index))) for index in self.indices if ranks_of(index))

    @cached_property
    def space(self) -> frozenset[sympy.Symbol]:
        """The iteration space: every rank the Einsum walks over."""
        return frozenset(self.kept) | frozenset(self.reduced)

    @property
    def iterative(self) -> sympy.Symbol | None:
        """The rank c of a step written at ``c + 1``."""
        for index in self.indices:
            if not index.is_Symbol and ranks_of(index):
                return next(iter(ranks_of(index)))
        return None

    @property
    def is_start(self) -> bool:
        """True for the start of an iterative tensor, ``RM[m,0] = -inf``."""
        return any(not ranks_of(index) for index in self.indices)

    @cached_property
    def reads(self) -> tuple[AppliedUndef, ...]:
        return tuple(accesses(self.body))

    @cached_property
    def read_names(self) -> frozenset[str]:
        """The tensors that the Einsum reads."""
        return frozenset(map(tensor_name, self.reads))

    @cached_property
    def read_ranks(self) -> tuple[tuple[str, frozenset[sympy.Symbol]], ...]:
        """(tensor, ranks in its indices) of each of ``reads``."""
        return tuple((tensor_name(item), frozenset().union(*map(ranks_of, item.args))) for item in self.reads)


@dataclass(frozen=True)
class Cascade:
    """Einsums in an order in which each reads only inputs and what was written before it."""

    einsums: tuple[Einsum, ...]

    @cached_property
    def definitions(self) -> Mapping[str, Einsum]:
        """Tensor -> the Einsum that writes it (the step, for an iterative tensor)."""
        table: dict[str, Einsum] = {}
        for einsum in self.einsums:
            if not einsum.is_start or einsum.output not in table:
                table[einsum.output] = einsum
        return table

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor's name: for each line those that it reads, then the one that it writes."""
        names: dict[str, None] = {}
        for einsum in self.einsums:
            for item in einsum.reads:
                names.setdefault(tensor_name(item))
            names.setdefault(einsum.output)
        return tuple(names)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if name not in self.definitions)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Tensors that no other Einsum reads."""
        read = {
            tensor_name(item) for einsum in self.einsums for item in einsum.reads if tensor_name(item) != einsum.output
        }
        return tuple(name for name in self.definitions if name not in read)

    @cached_property
    def ranks(self) -> tuple[sympy.Symbol, ...]:
        """Every rank variable, in order of first appearance."""
        found: dict[sympy.Symbol, None] = {}
        for einsum in self.einsums:
            for symbol in (*einsum.kept, *einsum.reduced):
                found.setdefault(symbol)
        return tuple(found)

    @cached_property
    def tensor_ranks(self) -> Mapping[str, tuple[sympy.Symbol, ...]]:
        """Tensor -> the rank variables it is written or read with, in position order."""
        table: dict[str, list[list[sympy.Symbol]]] = {}

        def note(name: str, indices: Sequence[sympy.Expr]) -> None:
            positions = table.setdefault(name, [[] for _ in indices])
            for position, index in zip(positions, indices, strict=True):
                position.extend(
                    symbol for symbol in sorted(ranks_of(index), key=lambda s: s.name) if symbol not in position
                )

        for einsum in self.einsums:
            note(einsum.output, einsum.indices)
        for einsum in self.einsums:
            for item in einsum.reads:
                note(tensor_name(item), item.args)
        return {name: tuple(dict.fromkeys(s for p in positions for s in p)) for name, positions in table.items()}


def check(cascade: Cascade) -> None:
    """Raise ``CascadeError`` unless the cascade is well-formed; the message names the Einsum."""
    written: dict[str, set[bool]] = {}
    arity: dict[str, int] = {}
    for einsum in cascade.einsums:
        where = f"line {einsum.line}" if einsum.line else einsum.output
        _check_arity(arity, einsum.output, len(einsum.indices), where)
        for item in einsum.reads:
            name = tensor_name(item)
            _check_arity(arity, name, len(item.args), where)
            recursive = name == einsum.output and einsum.iterative is not None
            if name in cascade.definitions and name not in written and not recursive:
                raise CascadeError(f"{name} is read before it is written", where=where, remedy="Move its line up.")
        check_ranks(einsum, where)
        kinds = written.setdefault(einsum.output, set())
        if einsum.is_start in kinds or (kinds and einsum.iterative is None and not einsum.is_start):
            raise CascadeError(f"{einsum.output} is written twice", where=where, remedy="Give the second another name.")
        kinds.add(einsum.is_start)
    for name, kinds in written.items():
        if kinds == {True}:
            raise CascadeError(f"{name} has a start but no step", where=name, remedy=f"Write {name}[..., c+1] = ...")
        if kinds == {False} and cascade.definitions[name].iterative is not None:
            raise CascadeError(f"{name} has a step but no start", where=name, remedy=f"Write {name}[..., 0] = ...")


def _check_arity(arity: dict[str, int], name: str, count: int, where: str) -> None:
    known = arity.setdefault(name, count)
    if known != count:
        raise CascadeError(
            f"{name} has {known} ranks elsewhere and {count} here",
            where=where,
            remedy="A tensor has as many indices everywhere; give another tensor another name.",
        )


def check_ranks(einsum: Einsum, where: str) -> None:
    """The rules that concern one Einsum alone. Raises ``CascadeError``."""
    kept = einsum.kept
    if len(set(kept)) != len(kept):
        raise CascadeError(
            f"a rank occurs twice in the output {einsum.output}",
            where=where,
            remedy="A diagonal is read, not written: use each rank once on the left.",
        )
    if any(not ranks_of(index) and index != 0 for index in einsum.indices):
        raise CascadeError(f"{einsum.output} does not start at 0", where=where, remedy="An iterative rank starts at 0.")
    both = set(kept) & set(einsum.reduced)
    if both:
        raise CascadeError(
            f"rank {min(s.name for s in both)} is both kept and reduced",
            where=where,
            remedy=f"Drop it from {einsum.output}'s indices or from the reduction.",
        )
    free = ranks_of(einsum.body) - einsum.space
    if free:
        name = min(symbol.name for symbol in free)
        raise CascadeError(
            f"rank {name} is neither kept nor reduced",
            where=where,
            remedy=f"Add it to {einsum.output}'s indices, or reduce it: sum[{name}]. A scalar is written Name[].",
        )
    step = einsum.iterative
    for item in einsum.reads:
        if tensor_name(item) == einsum.output:
            if step is None:
                raise CascadeError(f"{einsum.output} reads itself", where=where, remedy="Only an iterative rank may.")
            position = next(i for i, index in enumerate(einsum.indices) if not index.is_Symbol)
            if item.args[position] != step:
                raise CascadeError(
                    f"{einsum.output} may read itself only at {step}, the step before",
                    where=where,
                    remedy=f"Index it with {step} on the right of the equals sign.",
                )
