"""Matrix products as sums of products."""

from __future__ import annotations

from .calls import Call
from .lower_pointwise import numeric_type
from .program import PRECISION, NotRaised, Program
from .registry import lowers
from .steps import Value


@lowers("mm", "bmm")
def lower_product(program: Program, call: Call) -> Value:
    numeric_type(call)
    if len(call.node.args) > 2:
        raise NotRaised("a product with another result type")
    return program.contract(call.value(0), call.value(1))


@lowers("mv", "dot")
def lower_vector_product(program: Program, call: Call) -> Value:
    numeric_type(call)
    return program.inner(call.value(0), call.value(1))


@lowers("matmul")
def lower_matmul(program: Program, call: Call) -> Value:
    numeric_type(call)
    left, right = call.value(0), call.value(1)
    if left.ndim == 0 or right.ndim == 0:
        raise NotRaised("a product with a scalar")
    if right.ndim == 1:
        return program.inner(left, right)
    if left.ndim == 1:
        return program.reshape(program.contract(program.unsqueeze(left, 0), right), call.type.shape)
    return program.contract(left, right)


@lowers("addmm", "baddbmm")
def lower_addmm(program: Program, call: Call) -> Value:
    if call.type.dtype not in PRECISION:
        raise NotRaised("a product of integers with scales")
    beta, alpha = call.number(-1, "beta", 1), call.number(-1, "alpha", 1)
    if beta == 0:
        raise NotRaised("an addend with the weight 0")
    total = program.contract(call.value(1), call.value(2))
    return program.map(lambda t, b: alpha * t + beta * b, total, call.value(0), dtype=call.type.dtype)


@lowers("linear")
def lower_linear(program: Program, call: Call) -> Value:
    numeric_type(call)
    value, weight, bias = call.value(0), call.value(1), call.optional(2, "bias")
    if weight.ndim != 2:
        raise NotRaised("a linear layer with one output")
    total = program.contract(program.unsqueeze(value, -2), program.transpose(weight))
    total = program.reshape(total, call.type.shape)
    return total if bias is None else program.map(lambda t, b: t + b, total, bias)


@lowers("outer", "ger")
def lower_outer(program: Program, call: Call) -> Value:
    numeric_type(call)
    return program.map(lambda a, b: a * b, program.unsqueeze(call.value(0), 1), call.value(1))
