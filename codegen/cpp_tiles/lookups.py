"""Sums of which an index picks one term, without a loop over the others.

Of ``sum[t] where(t == I, X[t], 0)`` at most one term counts: the element ``X[I]``, if ``I`` is a coordinate of t. And
where a sum keeps t, each of its terms goes to one place.

rewrite::

    reduce E[m,n] = sum[t] where(t == I[m,n], T[t,h], 0)        ->   E[m,n] = looked up in T[t,h] at t = I[m,n]
    reduce B[t] sum= sum[m,n] where(t == I[m,n], D[m,n], 0)     ->   B[I[m,n]] += D[m,n], for each m and n
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import CascadeFunction, Equal, Where, ranks_of, tensor_name
from ...ir.tile import Carry, Map, Reduce
from .frame import Frame


class LookedUp(CascadeFunction):
    """``LookedUp(T[t,h], t, I)``: the element at t = I; 0 where I is none of the tile's coordinates of t."""

    nargs = 3


class Found(CascadeFunction):
    """``Found(t, I)``: whether I is one of the tile's coordinates of t."""

    nargs = 2


@dataclass(frozen=True)
class Scatter:
    """``target`` at ``rank`` = ``index`` += ``body``, for every coordinate of its other ranks and the ``reduced``
    ones. Nothing where the index is none of the tile's coordinates of the rank."""

    target: AppliedUndef
    rank: sympy.Symbol
    index: sympy.Expr
    reduced: tuple[sympy.Symbol, ...]
    body: sympy.Expr


def without_search(item: Reduce, frame: Frame) -> list[Reduce | Map | Carry | Scatter]:
    """Statements that do what a reduction does, without a loop over ranks of which an index picks one coordinate."""
    if item.reduction != "sum":
        return [item]
    for symbol in item.reduced:
        found = _picked(item.body, symbol, frame)
        if found is not None:
            index, body = found
            alone = isinstance(body, LookedUp)
            body = body if alone else Where(Found(symbol, index), body, sympy.S.Zero)
            rest = tuple(s for s in item.reduced if s != symbol)
            if rest:
                return without_search(replace(item, reduced=rest, body=body), frame)
            return [Carry(item.target, item.target + body) if item.accumulate else Map(item.target, body)]
    for symbol in item.target.args:
        found = _picked(item.body, symbol, frame)
        if found is not None:
            added = Scatter(item.target, symbol, found[0], item.reduced, found[1])
            return [added] if item.accumulate else [Map(item.target, sympy.S.Zero), added]
    return [item]


def looked_through(e: sympy.Expr) -> frozenset[str]:
    """The names of what an expression looks up: elements that may be anywhere."""
    return frozenset(tensor_name(node.args[0]) for node in e.atoms(LookedUp))


def _picked(e: sympy.Expr, symbol: sympy.Symbol, frame: Frame) -> tuple[sympy.Expr, sympy.Expr] | None:
    """(the one coordinate of a rank where an expression is not 0, the expression there); None if that is not known."""
    conditions, body = _masked(e)
    for condition in conditions:
        if not isinstance(condition, Equal) or symbol not in condition.args:
            continue
        index = condition.args[1] if condition.args[0] == symbol else condition.args[0]
        if symbol in ranks_of(index):
            continue
        rest = sympy.Mul(*(each for each in conditions if each != condition))
        parts = [_at(each, symbol, index, frame) for each in (rest, body)]
        if any(part is None for part in parts):
            return None
        return index, parts[1] if rest == 1 else Where(parts[0], parts[1], sympy.S.Zero)
    return None


def _masked(e: sympy.Expr) -> tuple[list[sympy.Expr], sympy.Expr]:
    """(conditions, rest) of an expression that is the rest where all conditions hold, and else 0."""
    if isinstance(e, Where) and e.args[2] == 0:
        inner, rest = _masked(e.args[1])
        return list(dict.fromkeys([*sympy.Mul.make_args(e.args[0]), *inner])), rest
    if e.is_Mul:
        parts = [_masked(factor) for factor in e.args]
        conditions = dict.fromkeys(condition for found, _ in parts for condition in found)
        return list(conditions), sympy.Mul(*(rest for _, rest in parts))
    return [], e


def _at(e: sympy.Expr, symbol: sympy.Symbol, index: sympy.Expr, frame: Frame) -> sympy.Expr | None:
    """The expression with an index for a rank; None if that cannot be read."""
    if symbol not in ranks_of(e):
        return e
    if e == symbol:
        return index
    if isinstance(e, AppliedUndef):
        return None if not frame.is_value(e) and frame.can_leave(e) else LookedUp(e, symbol, index)
    if isinstance(e, LookedUp):
        return None
    parts = [_at(part, symbol, index, frame) for part in e.args]
    return None if any(part is None for part in parts) else e.func(*parts)
