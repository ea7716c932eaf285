"""Deferral for max and min: a monotone function of something x-only is largest and smallest at that thing's ends.

``max_n F(u(x_n), d) = F(max_n u(x_n), d)`` if F does not decrease in u, ``= F(min_n u, d)`` if it does not increase,
``= max(F(max_n u, d), F(min_n u, d))`` if it does one of the two, but which is only known later (the sign of a factor).
In the tropical semirings this is rank 1: (max, +) for ``u + h(d)``, (max, *) for ``u * h(d)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ..ir.cascade import Maximum, Minimum, Relu, Round, Sigmoid
from ..ir.cascade_printer import print_expression
from .separable_rank import NotSeparable, Variables

#: Stands for the finished maximum (or minimum) in ``Monotone.rebuild``.
FINISHED = sympy.Dummy("finished", real=True)
_INCREASING = (sympy.exp, sympy.tanh, Sigmoid, Relu, Round)


@dataclass(frozen=True)
class Monotone:
    """``f = rebuild(u)``. ``direction``: 1 if rebuild does not decrease, -1 if it does not increase, 0 for either."""

    u: sympy.Expr
    rebuild: sympy.Expr
    direction: int


def split_monotone(e: sympy.Expr, v: Variables) -> Monotone:
    """Write f as a monotone function of an expression that has no d. Raises ``NotSeparable``."""
    if not v.has_d(e):
        return Monotone(e, FINISHED, 1)
    if not v.has_x(e):
        return Monotone(sympy.Integer(0), e, 1)
    if e.is_Add:
        return _sum(e, v)
    if e.is_Mul:
        return _product(e, v)
    if e.func in _INCREASING or (e.func is sympy.log and v.positive(e.args[0])):
        inner = split_monotone(e.args[0], v)
        return Monotone(inner.u, e.func(inner.rebuild), inner.direction)
    if e.is_Pow and e.args[1].is_number and e.args[1].is_real and v.positive(e.args[0]):
        inner = split_monotone(e.args[0], v)
        return Monotone(inner.u, inner.rebuild ** e.args[1], inner.direction * (1 if e.args[1].is_positive else -1))
    if isinstance(e, Maximum | Minimum):
        varying = [argument for argument in e.args if v.has_x(argument)]
        if len(varying) == 1:
            inner = split_monotone(varying[0], v)
            args = [inner.rebuild if argument is varying[0] else argument for argument in e.args]
            return Monotone(inner.u, type(e)(*args), inner.direction)
    raise NotSeparable(f"not a monotone function of one expression without earlier results: {print_expression(e)}")


def _sum(e: sympy.Expr, v: Variables) -> Monotone:
    mixed = [part for part in e.args if v.has_x(part) and v.has_d(part)]
    varying = sympy.Add(*(part for part in e.args if v.has_x(part) and not v.has_d(part)))
    fixed = sympy.Add(*(part for part in e.args if not v.has_x(part)))
    if not mixed:
        return Monotone(varying, FINISHED + fixed, 1)
    if varying == 0 and len(mixed) == 1:
        inner = split_monotone(mixed[0], v)
        return Monotone(inner.u, inner.rebuild + fixed, inner.direction)
    factored = sympy.factor_terms(e)
    if factored.is_Mul:
        return _product(factored, v)
    raise NotSeparable(f"a sum that mixes both sides: {print_expression(e)}")


def _product(e: sympy.Expr, v: Variables) -> Monotone:
    mixed = [factor for factor in e.args if v.has_x(factor) and v.has_d(factor)]
    plain = sympy.Mul(*(factor for factor in e.args if v.has_x(factor) and not v.has_d(factor)))
    fixed = sympy.Mul(*(factor for factor in e.args if not v.has_x(factor)))
    if (mixed and plain != 1) or len(mixed) > 1:
        raise NotSeparable(f"a product that mixes both sides: {print_expression(e)}")
    bound = v.bound(fixed)
    sign = 1 if bound.low >= 0 else -1 if bound.high <= 0 else 0
    inner = split_monotone(mixed[0], v) if mixed else Monotone(plain, FINISHED, 1)
    return Monotone(inner.u, inner.rebuild * fixed, inner.direction * sign)
