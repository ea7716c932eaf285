"""What a dependent reduction sums, as a function f(x, d) of plain symbols.

Maps between the reductions are inlined first. Then each tensor access is one symbol: x if it varies along what is
reduced, d if it depends on reductions over the same rank that the pass aimed at does not find finished, else neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from ..ir.cascade import Cascade, Einsum, accesses, is_rank, ranks_of, tensor_name
from .cascade_analysis import RankPasses
from .intervals import ANY, Interval
from .separable_rank import NotSeparable, Variables


@dataclass(frozen=True)
class Summand:
    """``f`` in symbols; ``access`` maps them back. ``depends_on`` are the tensors of the d symbols."""

    f: sympy.Expr
    access: Mapping[sympy.Symbol, AppliedUndef]
    variables: Variables
    depends_on: tuple[str, ...]

    def concrete(self, e: sympy.Expr) -> sympy.Expr:
        """Symbols replaced by tensor accesses."""
        return e.xreplace(dict(self.access))

    def symbolic(self, e: sympy.Expr) -> sympy.Expr:
        """Tensor accesses replaced by symbols."""
        return e.xreplace({item: symbol for symbol, item in self.access.items()})


def summand(cascade: Cascade, einsum: Einsum, aim: int, found: RankPasses, bounds: Mapping[str, Interval]) -> Summand:
    """The summand of a reduction that shall be done in pass ``aim``. Raises ``NotSeparable``."""
    body = inline_maps(cascade, einsum, aim, found)
    reduced = frozenset(einsum.reduced)
    symbols: dict[AppliedUndef, sympy.Symbol] = {}
    used = {symbol.name for symbol in body.free_symbols}
    x: set[sympy.Symbol] = set(reduced)
    d: dict[sympy.Symbol, str] = {}
    for item in accesses(body):
        name = tensor_name(item)
        symbol = _symbol(name, used, bounds.get(name, ANY))
        symbols[item] = symbol
        value, here = found.operand(cascade, item, einsum)
        varies = bool(ranks_of_access(item) & reduced)
        if not here and value >= aim:
            if varies:
                raise NotSeparable(f"{name} depends on reductions over the rank and varies over another reduced rank")
            d[symbol] = name
        elif varies:
            x.add(symbol)
    table = {symbol: bounds.get(tensor_name(item), ANY) for item, symbol in symbols.items()}

    def leaf(e: sympy.Expr) -> Interval:
        if e.is_Symbol and is_rank(e):
            return Interval(0.0)
        return table.get(e, ANY)

    variables = Variables(frozenset(x), frozenset(d), leaf)
    back = {symbol: item for item, symbol in symbols.items()}
    return Summand(body.xreplace(symbols), back, variables, tuple(dict.fromkeys(d.values())))


def ranks_of_access(item: AppliedUndef) -> frozenset[sympy.Symbol]:
    """The ranks in an access's indices."""
    return frozenset().union(*(ranks_of(index) for index in item.args))


def _symbol(name: str, used: set[str], bound: Interval) -> sympy.Symbol:
    unique, count = name, 1
    while unique in used:
        count += 1
        unique = f"{name}_{count}"
    used.add(unique)
    if bound.positive:
        return sympy.Symbol(unique, positive=True)
    return sympy.Symbol(unique, nonnegative=True) if bound.low >= 0 else sympy.Symbol(unique, real=True)


def inline_maps(cascade: Cascade, einsum: Einsum, aim: int, found: RankPasses) -> sympy.Expr:
    """The body with every map that is only ready after pass ``aim``, and keeps the rank, replaced by what it maps."""
    body = einsum.body
    while True:
        table: dict[AppliedUndef, sympy.Expr] = {}
        for item in accesses(body):
            value, here = found.operand(cascade, item, einsum)
            if here and value > aim:
                table[item] = _inlined(cascade, item)
        if not table:
            return body
        body = body.xreplace(table)


def _inlined(cascade: Cascade, item: AppliedUndef) -> sympy.Expr:
    name = tensor_name(item)
    definition = cascade.definitions[name]
    if definition.reduction is not None:
        ranks = ", ".join(symbol.name for symbol in definition.reduced)
        raise NotSeparable(f"{name} reduces {ranks} of something that needs the whole fiber first")
    if definition.iterative is not None:
        raise NotSeparable(f"{name} is a recurrence over something that needs the whole fiber first")
    return definition.body.xreplace(dict(zip(definition.indices, item.args, strict=True)))
