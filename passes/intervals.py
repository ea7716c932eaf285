"""Interval analysis of cascade expressions: what signs and bounds are certain, whatever the inputs are.

Inputs may be any number. The bounds decide whether a product under log or a power may be split (signs), whether
an exponential can leave the floating-point range (bounds), and whether two parts of a sum can cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from ..ir.cascade import (
    COMPARISONS,
    Cascade,
    Maximum,
    Minimum,
    Relu,
    Round,
    Sigmoid,
    Where,
    is_rank,
    is_size,
    tensor_name,
)

#: exp(a) and sums of up to 10^9 such terms stay in f32's range, above and below, for |a| up to this.
SAFE_EXPONENT = 60.0


@dataclass(frozen=True)
class Interval:
    """[low, high]; ``nonzero`` if 0 is excluded for finite inputs (as for exp)."""

    low: float = -math.inf
    high: float = math.inf
    nonzero: bool = False

    @property
    def positive(self) -> bool:
        return self.low > 0 or (self.low >= 0 and self.nonzero)

    @property
    def negative(self) -> bool:
        return self.high < 0 or (self.high <= 0 and self.nonzero)


ANY = Interval()


def tensor_intervals(cascade: Cascade) -> dict[str, Interval]:
    """A bound for every computed tensor; inputs and iterative tensors are unbounded."""
    table: dict[str, Interval] = {}

    def leaf(e: sympy.Expr) -> Interval:
        if isinstance(e, AppliedUndef):
            return table.get(tensor_name(e), ANY)
        return Interval(0.0) if is_rank(e) else ANY

    for einsum in cascade.einsums:
        if einsum.is_start or einsum.iterative is not None:
            table[einsum.output] = ANY
            continue
        body = interval(einsum.body, leaf)
        table[einsum.output] = _reduce(einsum.reduction, body)
    return table


def _reduce(reduction: str | None, body: Interval) -> Interval:
    if reduction in (None, "max", "min"):
        return body
    if reduction == "sum":
        low = body.low if body.low >= 0 else -math.inf
        high = body.high if body.high <= 0 else math.inf
        return Interval(low, high, body.positive or body.negative)
    if body.low >= 0:
        return Interval(0.0, 1.0 if body.high <= 1 else math.inf, body.positive)
    return ANY


def interval(e: sympy.Expr, leaf: Callable[[sympy.Expr], Interval]) -> Interval:
    """A bound for the expression. ``leaf`` bounds tensor accesses and symbols other than sizes."""
    if e.is_Number or e in (sympy.oo, -sympy.oo):
        if e is sympy.nan:
            return ANY
        value = float(e)
        return Interval(value, value, value != 0)
    if e.is_Symbol:
        if is_size(e):
            return Interval(1.0, math.inf, True)
        found = leaf(e)
        if found == ANY and e.is_positive:
            return Interval(0.0, math.inf, True)
        return found
    if e is sympy.E:
        return Interval(math.e, math.e, True)
    if isinstance(e, AppliedUndef):
        return leaf(e)
    parts = [interval(argument, leaf) for argument in e.args]
    if e.is_Add:
        low, high = sum(p.low for p in parts), sum(p.high for p in parts)
        low, high = (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)
        same = all(p.low >= 0 for p in parts) or all(p.high <= 0 for p in parts)
        return Interval(low, high, same and any(p.nonzero for p in parts))
    if e.is_Mul:
        result = parts[0]
        for part in parts[1:]:
            result = _product(result, part)
        return result
    if e.is_Pow:
        return _power(parts[0], e.args[1])
    return _function(e, parts)


def _product(a: Interval, b: Interval) -> Interval:
    corners = [0.0 if 0.0 in (x, y) else x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return Interval(min(corners), max(corners), a.nonzero and b.nonzero)


def _power(base: Interval, exponent: sympy.Expr) -> Interval:
    if exponent.is_Integer and int(exponent) % 2 == 0 and exponent > 0:
        ends = [abs(base.low), abs(base.high)]
        low = 0.0 if base.low <= 0 <= base.high else min(ends)
        return Interval(_pow(low, int(exponent)), _pow(max(ends), int(exponent)), base.nonzero)
    if exponent.is_Integer and exponent > 0:
        return Interval(_pow(base.low, int(exponent)), _pow(base.high, int(exponent)), base.nonzero)
    if base.low >= 0 and exponent.is_number:
        power = float(exponent)
        ends = [_pow(base.low, power), _pow(base.high, power)]
        return Interval(min(ends), max(ends), base.nonzero or power < 0)
    if exponent.is_Integer and int(exponent) % 2 == 0:
        return Interval(0.0, math.inf, True)
    if base.positive:
        return Interval(0.0, math.inf, True)
    return ANY


def _pow(value: float, power: float) -> float:
    if value == 0 and power < 0:
        return math.inf
    try:
        return float(value**power)
    except OverflowError:
        return math.inf if value > 0 or power % 2 == 0 else -math.inf


def _function(e: sympy.Expr, parts: list[Interval]) -> Interval:
    x = parts[0] if parts else ANY
    cls = type(e)
    if e.func is sympy.exp:
        return Interval(_exp(x.low), _exp(x.high), True)
    if e.func is sympy.log and x.low > 0:
        return Interval(math.log(x.low), math.log(x.high) if x.high < math.inf else math.inf)
    if e.func is sympy.tanh:
        return Interval(math.tanh(x.low), math.tanh(x.high), x.nonzero)
    if e.func is sympy.Abs:
        low = 0.0 if x.low <= 0 <= x.high else min(abs(x.low), abs(x.high))
        return Interval(low, max(abs(x.low), abs(x.high)), x.nonzero)
    if cls is Sigmoid:
        return Interval(0.0, 1.0, True)
    if cls is Relu:
        return Interval(max(x.low, 0.0), max(x.high, 0.0), x.positive)
    if cls is Round:
        return Interval(
            math.floor(x.low) if abs(x.low) < math.inf else x.low,
            math.ceil(x.high) if abs(x.high) < math.inf else x.high,
        )
    if cls is Maximum:
        return Interval(max(p.low for p in parts), max(p.high for p in parts), any(p.positive for p in parts))
    if cls is Minimum:
        return Interval(min(p.low for p in parts), min(p.high for p in parts), any(p.negative for p in parts))
    if cls is Where:
        a, b = parts[1], parts[2]
        return Interval(min(a.low, b.low), max(a.high, b.high), a.nonzero and b.nonzero)
    if cls in COMPARISONS.values():
        return Interval(0.0, 1.0)
    return ANY


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
