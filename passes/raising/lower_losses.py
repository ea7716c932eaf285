"""nll_loss, with weights and an index to ignore, and its gradient."""

from __future__ import annotations

from typing import Any

import sympy

from ...ir.cascade import Equal, NotEqual, Where
from .calls import Call
from .lower_indexing import is_index, pick
from .lower_pointwise import ONE, ZERO
from .program import NotRaised, Program
from .registry import lowers
from .steps import Value

_MEAN, _SUM = 1, 2


def _class_weight(program: Program, weight: Value | None, target: Value) -> Value | None:
    """The weight of each row's class."""
    return None if weight is None else pick(program, weight, target)


@lowers("nll_loss_forward")
def lower_nll_loss(program: Program, call: Call) -> Any:
    value, target, weight = call.value(0), is_index(call.value(1)), call.optional(2)
    reduction, ignored = call.integer(3), call.number(4)
    if value.ndim != 2:
        raise NotRaised("a loss of one row")
    picked = pick(program, value, target)
    used = program.map(lambda t: NotEqual(t, ignored), target, dtype="b1")
    factor = _class_weight(program, weight, target)
    if factor is None:
        rows = program.map(lambda u, x: Where(u, -x, ZERO), used, picked)
        counted = program.cast(used, value.dtype)
    else:
        rows = program.map(lambda u, x, w: Where(u, -x * w, ZERO), used, picked, factor)
        counted = program.map(lambda u, w: Where(u, w, ZERO), used, factor)
    if reduction not in (_MEAN, _SUM):
        zero = program.generate(lambda _, __: ZERO, (), value.dtype)
        return rows, zero
    total, weights = program.reduce("sum", rows), program.reduce("sum", counted)
    loss = program.map(lambda t, w: t / w, total, weights) if reduction == _MEAN else total
    return loss, weights


@lowers("nll_loss_backward")
def lower_nll_loss_backward(program: Program, call: Call) -> Value:
    gradient, value, target, weight = call.value(0), call.value(1), is_index(call.value(2)), call.optional(3)
    reduction, ignored = call.integer(4), call.number(5)
    if value.ndim != 2:
        raise NotRaised("a loss of one row")
    factor = _class_weight(program, weight, target)
    scale = program.map(lambda t: Where(NotEqual(t, ignored), ONE, ZERO), target, dtype=value.dtype)
    if factor is not None:
        scale = program.map(lambda s, w: s * w, scale, factor)
    if reduction == _MEAN:
        scale = program.map(lambda s, t: s / t, scale, call.value(6))
    rows = program.map(lambda g, s, t: Where(NotEqual(t, ignored), -g * s, ZERO), gradient, scale, target)
    at_row, classes = program.unsqueeze(rows, 1), program.unsqueeze(target, 1)

    def place(e: Any, at: Any) -> sympy.Expr:
        return Where(Equal(at[1], e[1]), e[0], ZERO)

    return program.generate(place, value.shape, value.dtype, at_row, classes)
