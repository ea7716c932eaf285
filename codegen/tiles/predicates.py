"""Masks: which conditions can be decided for a whole tile from its bounds, and what a tile is worth without them.

A condition is a comparison of expressions affine in ranks, sizes and numbers that one tile sees as scalars, or a
product (and), maximum (or) of such. ``n <= m`` says of a tile of queries and a tile of keys: nowhere (the tile is
skipped), everywhere (no mask is applied), or partly. Nothing here knows where a condition comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import (
    COMPARISONS,
    Equal,
    Maximum,
    Relu,
    Sigmoid,
    Where,
    accesses,
    is_rank,
    ranks_of,
)
from .facts import comparison_text

_COMPARISONS = tuple(COMPARISONS.values())


def conditions(expressions: Iterable[sympy.Expr]) -> list[sympy.Expr]:
    """The conditions of all ``where`` in the expressions, each once."""
    found: dict[sympy.Expr, None] = {}
    for e in expressions:
        for node in sorted(e.atoms(Where), key=sympy.default_sort_key):
            found.setdefault(node.args[0])
    return list(found)


def is_line(item: AppliedUndef, ranges: frozenset[sympy.Symbol]) -> bool:
    """Whether an access reads one line of a tensor in a tile: its least and greatest element are soon found."""
    return len(ranks_of(item) & ranges) == 1 and all(index.is_number or is_rank(index) for index in item.args)


def decidable(condition: sympy.Expr, ranges: frozenset[sympy.Symbol], scans: bool = False) -> bool:
    """Whether bounds on the ranks say something of a condition. ``ranges`` are the ranks that a tile has a range of.
    ``scans``: bounds of lines of tensors are known, too."""
    if isinstance(condition, _COMPARISONS):
        difference = sympy.expand(condition.args[0] - condition.args[1])
        if difference.has(sympy.oo, -sympy.oo, sympy.nan) or not ranks_of(difference) & ranges:
            return False
        inside = [item for item in accesses(difference) if ranks_of(item) & ranges]
        if difference.atoms(sympy.Function) - set(accesses(difference)):
            return False
        if not all(scans and is_line(item, ranges) and difference.coeff(item).is_number for item in inside):
            return False
        difference = difference.xreplace({item: sympy.Dummy() for item in inside})
        if inside and not ranks_of(difference) & ranges:
            return True
        own = sorted(ranks_of(difference) & ranges, key=lambda s: s.name)
        if not difference.is_polynomial(*own):
            return False
        polynomial = sympy.Poly(difference, *own)
        # A coefficient's sign must be known.
        return bool(polynomial.total_degree() <= 1) and all(
            polynomial.coeff_monomial(s).is_number for s in own if polynomial.coeff_monomial(s) != 0
        )
    if condition.is_Mul:
        return any(decidable(part, ranges, scans) for part in condition.args)
    if isinstance(condition, Maximum):
        return all(decidable(part, ranges, scans) for part in condition.args)
    return False


def certain_part(condition: sympy.Expr, ranges: frozenset[sympy.Symbol], scans: bool = False) -> sympy.Expr:
    """The factors of a condition that bounds can prove true everywhere; 1 if there is none. An equality with a rank's
    coordinate never holds for a range of them."""
    parts = [part for part in sympy.Mul.make_args(condition) if decidable(part, ranges, scans)]
    parts = [part for part in parts if not (isinstance(part, Equal) and ranges & set(part.args))]
    return sympy.Mul(*parts, evaluate=False) if len(parts) > 1 else (parts[0] if parts else sympy.Integer(1))


def where_true(e: sympy.Expr, known: frozenset[sympy.Expr]) -> sympy.Expr:
    """The expression where every condition in ``known`` holds."""
    if not e.args or not e.has(Where):
        return e
    args = [where_true(argument, known) for argument in e.args]
    if isinstance(e, Where):
        rest = [part for part in sympy.Mul.make_args(args[0]) if part not in known]
        return decided(Where, [sympy.Mul(*rest), args[1], args[2]])
    return decided(e.func, args)


def where_false(e: sympy.Expr, condition: sympy.Expr) -> sympy.Expr:
    """The expression where the condition does not hold."""
    if not e.args or not e.has(Where):
        return e
    if isinstance(e, Where) and e.args[0] == condition:
        return where_false(e.args[2], condition)
    return decided(e.func, [where_false(argument, condition) for argument in e.args])


def decided(func: Any, args: Sequence[sympy.Expr]) -> sympy.Expr:
    """``func(*args)``; a comparison of numbers as 1 or 0, and of a choice by a number the branch that it takes. Masks
    made of masks (``where(where(n <= m, 1, 0) == 0, -inf, S)``) come to that."""
    if func in _COMPARISONS and all(part.is_Number and part is not sympy.nan for part in args):
        text = comparison_text(func(*args))
        left, right = args
        held = {
            "<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right,
            "==": left == right, "!=": left != right,
        }[text]  # fmt: skip
        return sympy.Integer(bool(held))
    if func is Where and args[0].is_Number:
        return args[2] if args[0] == 0 else args[1]
    return func(*args)


def limit(e: sympy.Expr) -> sympy.Expr | None:
    """The value of an expression that infinities in it decide: a number, plus or minus infinity; None if unknown.

    A factor 0 makes a product 0: what a mask excludes contributes nothing, whatever it is.
    """
    if e.is_number:
        return e
    if not e.args or isinstance(e, sympy.core.function.AppliedUndef):
        return None
    parts = [limit(argument) for argument in e.args]
    if e.is_Mul and any(part == 0 for part in parts):
        return sympy.Integer(0)
    if e.is_Add:
        infinite = {part for part in parts if part in (sympy.oo, -sympy.oo)}
        if len(infinite) == 1:
            return infinite.pop()
    if isinstance(e, Where):
        return parts[1] if parts[1] is not None and parts[1] == parts[2] else None
    if any(part is None for part in parts):
        return None
    if isinstance(e, Sigmoid):
        return {-sympy.oo: sympy.Integer(0), sympy.oo: sympy.Integer(1)}.get(parts[0])
    if isinstance(e, Relu):
        return sympy.Integer(0) if parts[0] == -sympy.oo else None
    if e.is_Add or e.is_Mul or e.is_Pow or e.func in (sympy.exp, sympy.tanh):
        value = e.func(*parts)
        return value if value.is_number and value is not sympy.nan else None
    return None
