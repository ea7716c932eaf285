"""Reductions, softmaxes, and their backward ops."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from ...ir.cascade import Equal, NotEqual, Where
from .calls import Call
from .lower_pointwise import ZERO, truth
from .program import PRECISION, NotRaised, Program
from .registry import lowers
from .sizes import in_cascade, product
from .steps import Value


def count(value: Value, dims: Sequence[int]) -> sympy.Expr:
    """How many elements a reduction over ``dims`` (all, if empty) takes together."""
    return in_cascade(product(value.shape[dim] for dim in (dims or range(value.ndim))))


def mean(program: Program, value: Value, dims: Sequence[int], keepdim: bool = False) -> Value:
    number = count(value, dims)
    if number == 0:
        raise NotRaised("the mean of nothing")
    return program.map(lambda x: x / number, program.reduce("sum", value, dims, keepdim))


def variance(
    program: Program, value: Value, dims: Sequence[int], correction: sympy.Expr, keepdim: bool = False
) -> tuple[Value, Value]:
    """(variance, mean)."""
    centre = mean(program, value, dims, True)
    squares = program.map(lambda x, m: (x - m) ** 2, value, centre)
    number = count(value, dims) - correction
    if number.is_number and number <= 0:
        raise NotRaised("a variance without degrees of freedom")
    spread = program.map(lambda s: s / number, program.reduce("sum", squares, dims, True))
    if keepdim:
        return spread, centre
    dims = [dim % value.ndim for dim in dims] or list(range(value.ndim))
    shape = [size for dim, size in enumerate(value.shape) if dim not in dims]
    return program.reshape(spread, shape), program.reshape(centre, shape)


def softmax(program: Program, value: Value, dim: int) -> Value:
    powers = _stable_powers(program, value, dim)
    return program.map(lambda e, s: e / s, powers, program.reduce("sum", powers, [dim], True))


def _stable_powers(program: Program, value: Value, dim: int) -> Value:
    largest = program.reduce("max", value, [dim], True)
    return program.map(lambda x, m: sympy.exp(x - m), value, largest)


def log_softmax(program: Program, value: Value, dim: int) -> Value:
    largest = program.reduce("max", value, [dim], True)
    shifted = program.map(lambda x, m: x - m, value, largest)
    total = program.reduce("sum", program.map(sympy.exp, shifted), [dim], True)
    return program.map(lambda x, s: x - sympy.log(s), shifted, total)


@lowers("sum", "prims.sum")
def lower_sum(program: Program, call: Call) -> Value:
    value = call.value(0)
    if value.dtype == "b1" or call.type.dtype in PRECISION or value.dtype == call.type.dtype:
        value = program.cast(value, call.type.dtype)
    reduced = program.reduce("sum", value, call.dims(1), call.flag(2, "keepdim"))
    return program.cast(reduced, call.type.dtype)


@lowers("mean")
def lower_mean(program: Program, call: Call) -> Value:
    return program.cast(mean(program, call.value(0), call.dims(1), call.flag(2, "keepdim")), call.type.dtype)


@lowers("amax", "amin")
def lower_extremum(program: Program, call: Call) -> Value:
    kind = "max" if call.node.op.startswith("aten.amax") else "min"
    return program.reduce(kind, call.value(0), call.dims(1), call.flag(2, "keepdim"))


@lowers("max.default", "min.default")
def lower_whole_extremum(program: Program, call: Call) -> Value:
    return program.reduce("max" if call.node.op.startswith("aten.max") else "min", call.value(0))


@lowers("prod")
def lower_product(program: Program, call: Call) -> Value:
    return program.reduce("prod", program.cast(call.value(0), call.type.dtype), call.dims(1), call.flag(2, "keepdim"))


@lowers("any", "all")
def lower_truth(program: Program, call: Call) -> Value:
    kind = "max" if call.node.op.startswith("aten.any") else "min"
    value = truth(program, call.value(0))
    return program.reduce(kind, value, call.dims(1), call.flag(2, "keepdim"))


@lowers("var.correction", "var_mean.correction", "var.dim", "var_mean.dim")
def lower_variance(program: Program, call: Call) -> Value | tuple[Value, Value]:
    if call.node.op.endswith(".dim"):
        correction: sympy.Expr = sympy.Integer(int(call.flag(2, "unbiased", True)))
        keepdim = call.flag(3, "keepdim")
    else:
        raw = call.argument(-1, "correction")
        correction = sympy.Integer(1) if raw is None else call.number(-1, "correction")
        keepdim = call.flag(-1, "keepdim")
    spread, centre = variance(program, call.value(0), call.dims(1), correction, keepdim)
    return (spread, centre) if "var_mean" in call.node.op else spread


@lowers("logsumexp")
def lower_logsumexp(program: Program, call: Call) -> Value:
    value, dims = call.value(0), call.dims(1)
    if value.dtype not in PRECISION:
        raise NotRaised("a logsumexp of integers")
    raw = program.reduce("max", value, dims, True)
    largest = program.map(lambda m: Where(Equal(sympy.Abs(m), sympy.oo), ZERO, m), raw)
    powers = program.map(lambda x, m: sympy.exp(x - m), value, largest)
    total = program.map(lambda s, m: sympy.log(s) + m, program.reduce("sum", powers, dims, True), largest)
    return program.reshape(total, call.type.shape)


def _plain_softmax(call: Call) -> tuple[Value, int]:
    value = call.value(0)
    if value.dtype not in PRECISION or value.ndim == 0:
        raise NotRaised("a softmax of integers")
    return value, call.integer(1, "dim")


@lowers("_softmax", "softmax.int")
def lower_softmax(program: Program, call: Call) -> Value:
    value, dim = _plain_softmax(call)
    return program.cast(softmax(program, value, dim), call.type.dtype)


@lowers("_log_softmax", "log_softmax.int")
def lower_log_softmax(program: Program, call: Call) -> Value:
    value, dim = _plain_softmax(call)
    return program.cast(log_softmax(program, value, dim), call.type.dtype)


@lowers("_safe_softmax")
def lower_safe_softmax(program: Program, call: Call) -> Value:
    """A row of -inf only gives zeros."""
    value, dim = _plain_softmax(call)
    return program.cast(safe_softmax(program, value, dim), call.type.dtype)


def safe_softmax(program: Program, value: Value, dim: int) -> Value:
    finite = program.map(lambda x: NotEqual(x, -sympy.oo), value, dtype="b1")
    some = program.reduce("max", finite, [dim], True)
    return program.map(lambda p, s: Where(s, p, ZERO), softmax(program, value, dim), some)


@lowers("_softmax_backward_data")
def lower_softmax_backward(program: Program, call: Call) -> Value:
    gradient, output, dim = call.value(0), call.value(1), call.integer(2, "dim")
    weighted = program.map(lambda g, y: g * y, gradient, output)
    total = program.reduce("sum", weighted, [dim], True)
    return program.cast(program.map(lambda w, y, t: w - y * t, weighted, output, total), call.type.dtype)


@lowers("_log_softmax_backward_data")
def lower_log_softmax_backward(program: Program, call: Call) -> Value:
    gradient, output, dim = call.value(0), call.value(1), call.integer(2, "dim")
    total = program.reduce("sum", gradient, [dim], True)
    return program.cast(program.map(lambda g, y, t: g - sympy.exp(y) * t, gradient, output, total), call.type.dtype)
