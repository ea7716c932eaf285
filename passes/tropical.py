"""Deferral for max and min: a non-decreasing function of something x-only commutes with max.

``max_n F(u(x_n), d) = F(max_n u(x_n), d)`` if F does not decrease in u; ``= F(min_n u, d)`` if it does not increase. In
the tropical semirings this is rank 1: (max, +) for ``u + h(d)``, (max, *) for ``u * h(d)`` with h > 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ..ir.cascade import Maximum, Minimum, Relu, Round, Sigmoid
from .separable_rank import NotSeparable, Variables

#: Stands for the finished maximum in ``Monotone.rebuild``.
FINISHED = sympy.Dummy("finished", real=True)
_INCREASING = (sympy.exp, sympy.tanh, Sigmoid, Relu, Round)


@dataclass(frozen=True)
class Monotone:
    """``f = rebuild(u)``; ``increasing`` tells whether rebuild does not decrease (else it does not increase)."""

    u: sympy.Expr
    rebuild: sympy.Expr
    increasing: bool


def split_monotone(e: sympy.Expr, v: Variables) -> Monotone:
    """Write f as a monotone function of an expression that has no d. Raises ``NotSeparable``."""
    if not v.has_d(e):
        return _plain(e, v)
    if not v.has_x(e):
        return Monotone(sympy.Integer(0), e + 0 * FINISHED, True)
    if e.is_Add:
        return _sum(e, v)
    if e.is_Mul:
        return _product(e, v)
    if e.func in _INCREASING:
        inner = split_monotone(e.args[0], v)
        return Monotone(inner.u, e.func(inner.rebuild), inner.increasing)
    if e.func in (sympy.log,) and v.positive(e.args[0]):
        inner = split_monotone(e.args[0], v)
        return Monotone(inner.u, sympy.log(inner.rebuild), inner.increasing)
    if e.is_Pow and e.args[1].is_number and v.positive(e.args[0]):
        inner = split_monotone(e.args[0], v)
        grows = bool(e.args[1].is_positive)
        return Monotone(inner.u, inner.rebuild ** e.args[1], inner.increasing == grows)
    if isinstance(e, (Maximum, Minimum)):
        varying = [argument for argument in e.args if v.has_x(argument)]
        if len(varying) == 1:
            inner = split_monotone(varying[0], v)
            args = [inner.rebuild if argument is varying[0] else argument for argument in e.args]
            return Monotone(inner.u, type(e)(*args), inner.increasing)
    raise NotSeparable(f"not a monotone function of one expression without earlier results: {e}")


def _plain(e: sympy.Expr, v: Variables) -> Monotone:
    """Without d: move what does not vary along the fiber out of a sum."""
    fixed = [part for part in sympy.Add.make_args(e) if not v.has_x(part)]
    fixed = [part for part in fixed if part.is_finite is not False]
    rest = sympy.Add(*fixed)
    return Monotone(e - rest, FINISHED + rest, True)


def _sum(e: sympy.Expr, v: Variables) -> Monotone:
    mixed = [part for part in e.args if v.has_x(part) and v.has_d(part)]
    varying = sympy.Add(*(part for part in e.args if v.has_x(part) and not v.has_d(part)))
    fixed = sympy.Add(*(part for part in e.args if not v.has_x(part)))
    if not mixed:
        return Monotone(varying, FINISHED + fixed, True)
    if varying == 0 and len(mixed) == 1:
        inner = split_monotone(mixed[0], v)
        return Monotone(inner.u, inner.rebuild + fixed, inner.increasing)
    factored = sympy.factor_terms(e)
    if factored.is_Mul:
        return _product(factored, v)
    raise NotSeparable(f"a sum that mixes both sides: {e}")


def _product(e: sympy.Expr, v: Variables) -> Monotone:
    mixed = [factor for factor in e.args if v.has_x(factor) and v.has_d(factor)]
    plain = sympy.Mul(*(factor for factor in e.args if v.has_x(factor) and not v.has_d(factor)))
    fixed = sympy.Mul(*(factor for factor in e.args if not v.has_x(factor)))
    bound = v.bound(fixed)
    if (mixed and plain != 1) or len(mixed) > 1:
        raise NotSeparable(f"a product that mixes both sides: {e}")
    if not (bound.positive or bound.negative):
        raise NotSeparable(f"the sign of {fixed} is not known, so max does not commute with it")
    inner = split_monotone(mixed[0], v) if mixed else Monotone(plain, FINISHED, True)
    return Monotone(inner.u, inner.rebuild * fixed, inner.increasing == bound.positive)
