"""Layer norm and RMS norm, and their gradients."""

from __future__ import annotations

from typing import Any

from .calls import Call
from .lower_pointwise import rsqrt
from .lower_reductions import count, mean, variance
from .program import PRECISION, NotRaised, Program
from .registry import lowers
from .steps import Value


def _normalized(value: Value, call: Call, position: int) -> list[int]:
    """The dimensions that are normalized: the last ones."""
    shape = call.argument(position, "normalized_shape")
    if value.dtype not in PRECISION or not isinstance(shape, tuple):
        raise NotRaised("a norm of integers")
    return list(range(value.ndim - len(shape), value.ndim))


@lowers("native_layer_norm")
def lower_layer_norm(program: Program, call: Call) -> Any:
    value = call.value(0)
    dims = _normalized(value, call, 1)
    weight, bias, eps = call.optional(2), call.optional(3), call.number(4)
    spread, centre = variance(program, value, dims, count(value, dims) * 0, True)
    scale = program.map(lambda v: rsqrt(v + eps), spread)
    result = program.map(lambda x, m, r: (x - m) * r, value, centre, scale)
    if weight is not None:
        result = program.map(lambda x, w: x * w, result, weight)
    if bias is not None:
        result = program.map(lambda x, b: x + b, result, bias)
    return result, centre, scale


@lowers("native_layer_norm_backward")
def lower_layer_norm_backward(program: Program, call: Call) -> Any:
    gradient, value = call.value(0), call.value(1)
    dims = _normalized(value, call, 2)
    centre, scale, weight = call.value(3), call.value(4), call.optional(5)
    outer = [dim for dim in range(value.ndim) if dim not in dims]
    normal = program.map(lambda x, m, r: (x - m) * r, value, centre, scale)
    inner = gradient if weight is None else program.map(lambda g, w: g * w, gradient, weight)
    first = mean(program, inner, dims, True)
    second = mean(program, program.map(lambda g, x: g * x, inner, normal), dims, True)
    result = program.map(lambda g, a, b, x, r: (g - a - x * b) * r, inner, first, second, normal, scale)
    if not outer:
        raise NotRaised("a norm over everything")
    weights = program.reduce("sum", program.map(lambda g, x: g * x, gradient, normal), outer)
    return result, weights, program.reduce("sum", gradient, outer)


@lowers("_fused_rms_norm")
def lower_rms_norm(program: Program, call: Call) -> Any:
    value = call.value(0)
    dims = _normalized(value, call, 1)
    weight = call.optional(2)
    if call.argument(3) is None:
        raise NotRaised("a norm whose epsilon depends on the type")
    eps = call.number(3)
    square = mean(program, program.map(lambda x: x**2, value), dims, True)
    scale = program.map(lambda s: rsqrt(s + eps), square)
    result = program.map(lambda x, r: x * r, value, scale)
    return (result if weight is None else program.map(lambda x, w: x * w, result, weight)), scale
