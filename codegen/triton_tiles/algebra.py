"""Numbers that multiply expressions, moved to where they cost least."""

from __future__ import annotations

import sympy

from ...ir.cascade import Where


def without_factor(e: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(finite number, rest) of a product; a number in what a mask leaves counts where the mask gives 0 or an infinity,
    so that masked scores are one array whatever multiplies them."""
    factor, rest = e.as_coeff_Mul()
    if not factor.is_finite or factor == 0:
        return sympy.Integer(1), e
    if isinstance(rest, Where) and rest.args[2] in (sympy.Integer(0), sympy.oo, -sympy.oo):
        inner, left = without_factor(rest.args[1])
        if inner > 0 and not left.is_number:
            return factor * inner, Where(rest.args[0], left, rest.args[2])
    return factor, rest


def scaled(e: sympy.Expr, factor: sympy.Expr) -> sympy.Expr:
    """``e * factor`` for a positive number, with the factor joined to numbers that multiply the terms."""
    if e.is_Add:
        return sympy.Add(*(scaled(term, factor) for term in e.args))
    if e in (sympy.oo, -sympy.oo, sympy.nan) or e == 0:
        return e
    own, rest = without_factor(e)
    return sympy.Mul(own * factor, rest)
