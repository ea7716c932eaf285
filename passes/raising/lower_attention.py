"""``scaled_dot_product_attention`` and the CPU's flash op, written out; nothing else treats them apart."""

from __future__ import annotations

import math
from typing import Any

import sympy

from ...ir.cascade import LessEqual, Where
from .calls import Call, number
from .lower_pointwise import ZERO
from .lower_reductions import safe_softmax
from .program import PRECISION, NotRaised, Program
from .registry import lowers
from .sizes import divide, equal
from .steps import Value


def _scale(call: Call, query: Value, position: int) -> sympy.Expr:
    if call.argument(position, "scale") is not None:
        return call.number(position, "scale")
    width = query.shape[-1]
    if not isinstance(width, int):
        raise NotRaised("a head size that is not known")
    return number(1 / math.sqrt(width))


def scores(program: Program, query: Value, key: Value, mask: Value | None, causal: bool, scale: sympy.Expr) -> Value:
    """``scale * Q K^T``, plus the mask, or -inf where it is false."""
    found = program.map(lambda s: scale * s, program.contract(query, program.transpose(key)))
    if causal:
        found = program.generate(
            lambda e, at: Where(LessEqual(at[-1], at[-2]), e[0], -sympy.oo), found.shape, found.dtype, found
        )
    if mask is None:
        return found
    if mask.dtype == "b1":
        return program.map(lambda s, m: Where(m, s, -sympy.oo), found, mask)
    return program.map(lambda s, m: s + m, found, mask)


def _heads(program: Program, value: Value, heads: Any) -> Value:
    """Key or value heads repeated for grouped queries."""
    own = value.shape[-3]
    if equal(own, heads):
        return value
    times = divide(heads, own)
    if times is None:
        raise NotRaised("query heads that the key heads do not divide")
    narrow = program.unsqueeze(value, -3)
    shape = [*narrow.shape]
    shape[-3] = times
    return program.reshape(program.expand(narrow, shape), [*value.shape[:-3], heads, *value.shape[-2:]])


@lowers("scaled_dot_product_attention")
def lower_attention(program: Program, call: Call) -> Value:
    query, key, value, mask = call.value(0), call.value(1), call.value(2), call.optional(3, "attn_mask")
    if call.number(4, "dropout_p", 0.0) != 0 or query.dtype not in PRECISION or query.ndim < 3:
        raise NotRaised("attention with dropout")
    if call.flag(-1, "enable_gqa"):
        key, value = _heads(program, key, query.shape[-3]), _heads(program, value, query.shape[-3])
    whole = scores(program, query, key, mask, call.flag(5, "is_causal"), _scale(call, query, -1))
    return program.contract(safe_softmax(program, whole, -1), value)


@lowers("_scaled_dot_product_flash_attention_for_cpu")
def lower_flash(program: Program, call: Call) -> Any:
    """(output, logsumexp of the scores). For a row that is masked altogether the op gives zeros for both."""
    query, key, value, mask = call.value(0), call.value(1), call.value(2), call.optional(-1, "attn_mask")
    if call.number(3, "dropout_p", 0.0) != 0:
        raise NotRaised("attention with dropout")
    whole = scores(program, query, key, mask, call.flag(4, "is_causal"), _scale(call, query, -1))
    largest = program.reduce("max", whole, [-1], True)
    powers = program.map(lambda s, m: sympy.exp(s - m), whole, largest)
    total = program.reduce("sum", powers, [-1], True)
    weights = program.map(lambda e, t: e / t, powers, total)
    if mask is not None:
        some = program.map(lambda m: 1 - _is_minus_infinity(m), largest, dtype="b1")
        weights = program.map(lambda w, s: Where(s, w, ZERO), weights, some)
    lse = program.map(lambda m, t: m + sympy.log(t), largest, total)
    if mask is not None:
        lse = program.map(lambda total, s: Where(s, total, ZERO), lse, some)
    return program.contract(weights, value), program.reshape(lse, lse.shape[:-1])


def _is_minus_infinity(x: sympy.Expr) -> sympy.Expr:
    from ...ir.cascade import Equal

    return Equal(x, -sympy.oo)


@lowers("_scaled_dot_product_flash_attention_for_cpu_backward")
def lower_flash_backward(program: Program, call: Call) -> Any:
    gradient, query, key, value = (call.value(at) for at in range(4))
    output, lse = call.value(4), call.value(5)
    mask = call.optional(-1, "attn_mask")
    if call.number(6, "dropout_p", 0.0) != 0:
        raise NotRaised("attention's gradient with dropout")
    scale = _scale(call, query, -1)
    whole = scores(program, query, key, mask, call.flag(7, "is_causal"), scale)
    weights = program.map(lambda s, total: sympy.exp(s - total), whole, program.unsqueeze(lse, -1))
    of_weights = program.contract(gradient, program.transpose(value))
    delta = program.reduce("sum", program.map(lambda g, o: g * o, gradient, output), [-1], True)
    of_scores = program.map(lambda p, d, t: scale * p * (d - t), weights, of_weights, delta)
    to_query = program.contract(of_scores, key)
    to_key = program.contract(program.transpose(of_scores), query)
    return to_query, to_key, program.contract(program.transpose(weights), gradient)
