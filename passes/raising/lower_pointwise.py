"""Pointwise ops as maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from ...ir.cascade import (
    Equal,
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
    Maximum,
    Minimum,
    NotEqual,
    Relu,
    Round,
    Sigmoid,
    Where,
)
from .calls import Call, number
from .program import INTEGERS, PRECISION, NotRaised, Program
from .registry import lowers
from .steps import Value

ONE, ZERO, HALF = sympy.Integer(1), sympy.Integer(0), sympy.Rational(1, 2)


def rsqrt(x: sympy.Expr) -> sympy.Expr:
    return x ** sympy.Rational(-1, 2)


_UNARY: dict[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "neg": lambda x: -x,
    "exp": sympy.exp,
    "log": sympy.log,
    "tanh": sympy.tanh,
    "sigmoid": Sigmoid,
    "sqrt": sympy.sqrt,
    "rsqrt": rsqrt,
    "abs": sympy.Abs,
    "relu": Relu,
    "round": Round,
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x**2,
    "silu": lambda x: x * Sigmoid(x),
}
_COMPARE: dict[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "eq": Equal, "ne": NotEqual, "lt": Less, "le": LessEqual, "gt": Greater, "ge": GreaterEqual,
}  # fmt: skip
_LOGICAL: dict[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "and": lambda a, b: a * b,
    "or": Maximum,
    "xor": NotEqual,
}
#: Unary ops of which an integer argument is taken as a float by torch, or which stay integers.
_ON_INTEGERS = frozenset("neg abs square relu round".split())


def operands(call: Call, count: int) -> list[Value | sympy.Expr]:
    """The first ``count`` arguments, each a value or a number."""
    return [call.value(at) if call.is_value(at) else call.number(at) for at in range(count)]


def apply(program: Program, function: Callable[..., sympy.Expr], parts: list[Any], dtype: str) -> Value:
    """``function`` of values and numbers."""
    values = [part for part in parts if isinstance(part, Value)]
    if not values:
        raise NotRaised("no operand is a tensor")

    def call(*elements: sympy.Expr) -> sympy.Expr:
        left = iter(elements)
        return function(*(next(left) if isinstance(part, Value) else part for part in parts))

    return program.map(call, *values, dtype=dtype)


def _float_or_refuse(call: Call, name: str = "") -> str:
    dtype = call.type.dtype
    if dtype not in PRECISION and not (name in _ON_INTEGERS and dtype in INTEGERS):
        raise NotRaised(f"the result is of type {dtype}")
    return dtype


def _unary(name: str) -> None:
    @lowers(name)
    def lower(program: Program, call: Call) -> Value:
        dtype = _float_or_refuse(call, name)
        value = call.value(0)
        if name == "round" and (len(call.node.args) > 1 or call.node.kwargs):
            raise NotRaised("rounding to decimals")
        return program.map(_UNARY[name], value, dtype=dtype)


def _comparison(name: str) -> None:
    @lowers(name)
    def lower(program: Program, call: Call) -> Value:
        return apply(program, _COMPARE[name], operands(call, 2), "b1")


def _logical(name: str) -> None:
    @lowers(f"logical_{name}", f"bitwise_{name}", f"__{name}__")
    def lower(program: Program, call: Call) -> Value:
        if call.type.dtype != "b1":
            raise NotRaised("bits of integers")
        parts = [truth(program, part) if isinstance(part, Value) else part for part in operands(call, 2)]
        return apply(program, _LOGICAL[name], parts, "b1")


for _name in _UNARY:
    _unary(_name)
for _name in _COMPARE:
    _comparison(_name)
for _name in _LOGICAL:
    _logical(_name)


def truth(program: Program, value: Value) -> Value:
    """1 or 0."""
    return value if value.dtype == "b1" else program.map(lambda x: NotEqual(x, ZERO), value, dtype="b1")


@lowers("logical_not", "bitwise_not")
def lower_not(program: Program, call: Call) -> Value:
    value = call.value(0)
    if call.type.dtype != "b1":
        raise NotRaised("bits of integers")
    return program.map(lambda x: Equal(x, ZERO), value, dtype="b1")


def numeric_type(call: Call) -> str:
    dtype = call.type.dtype
    if dtype not in PRECISION and dtype not in INTEGERS:
        raise NotRaised(f"the result is of type {dtype}")
    return dtype


@lowers("add", "sub", "rsub")
def lower_sum(program: Program, call: Call) -> Value:
    a, b = operands(call, 2)
    alpha = call.number(2, "alpha", 1)
    if call.node.op.startswith("aten.rsub"):
        a, b = b, a
        if alpha != 1:
            raise NotRaised("a scaled subtraction")
    sign = -alpha if call.node.op.startswith(("aten.sub", "aten.rsub")) else alpha
    return apply(program, lambda x, y: x + sign * y, [a, b], numeric_type(call))


@lowers("mul")
def lower_product(program: Program, call: Call) -> Value:
    dtype = call.type.dtype
    return apply(program, lambda x, y: x * y, operands(call, 2), dtype if dtype == "b1" else numeric_type(call))


@lowers("div", "true_divide")
def lower_quotient(program: Program, call: Call) -> Value:
    if call.argument(2, "rounding_mode") is not None or call.type.dtype not in PRECISION:
        raise NotRaised("a rounded division")
    parts = operands(call, 2)
    if isinstance(parts[1], sympy.Expr) and parts[1] == 0:
        raise NotRaised("a division by 0")
    return apply(program, lambda x, y: x / y, parts, call.type.dtype)


@lowers("maximum", "minimum")
def lower_extremum(program: Program, call: Call) -> Value:
    function = Maximum if call.node.op.startswith("aten.maximum") else Minimum
    return apply(program, function, operands(call, 2), numeric_type(call))


@lowers("clamp", "clamp_min", "clamp_max")
def lower_clamp(program: Program, call: Call) -> Value:
    low: Any = None
    high: Any = None
    if call.node.op.startswith("aten.clamp_max"):
        high = operands(call, 2)[1]
    else:
        low = _bound(call, 1, "min")
        high = None if call.node.op.startswith("aten.clamp_min") else _bound(call, 2, "max")
    value = call.value(0)
    if low is not None:
        value = apply(program, Maximum, [value, low], numeric_type(call))
    return value if high is None else apply(program, Minimum, [value, high], numeric_type(call))


def _bound(call: Call, position: int, name: str) -> Any:
    if call.argument(position, name) is None:
        return None
    return call.value(position, name) if call.is_value(position, name) else call.number(position, name)


@lowers("pow")
def lower_power(program: Program, call: Call) -> Value:
    base, exponent = operands(call, 2)
    if isinstance(exponent, Value) or not exponent.is_Rational or abs(exponent) > 16:
        raise NotRaised("a power that is not a number")
    if 2 * exponent not in (1, -1) and not exponent.is_Integer:
        raise NotRaised("a power that is no whole number or square root")
    return apply(program, lambda x: x**exponent, [base], numeric_type(call))


@lowers("where")
def lower_where(program: Program, call: Call) -> Value:
    if len(call.node.args) != 3:
        raise NotRaised("positions of nonzero elements")
    return apply(program, Where, operands(call, 3), call.type.dtype)


@lowers("masked_fill")
def lower_masked_fill(program: Program, call: Call) -> Value:
    value, mask = call.value(0), call.value(1)
    fill = operands(call, 3)[2]
    return apply(program, lambda x, m, f: Where(m, f, x), [value, mask, fill], call.type.dtype)


@lowers("prims.fma")
def lower_fma(program: Program, call: Call) -> Value:
    return apply(program, lambda a, b, c: a * b + c, operands(call, 3), numeric_type(call))


@lowers("addcmul")
def lower_addcmul(program: Program, call: Call) -> Value:
    scale = call.number(3, "value", 1)
    return apply(program, lambda c, a, b: c + scale * a * b, operands(call, 3), numeric_type(call))


@lowers("threshold_backward")
def lower_threshold_backward(program: Program, call: Call) -> Value:
    limit = call.number(2)
    parts = [call.value(0), call.value(1)]
    return apply(program, lambda g, x: Where(LessEqual(x, limit), ZERO, g), parts, numeric_type(call))


@lowers("tanh_backward")
def lower_tanh_backward(program: Program, call: Call) -> Value:
    return apply(program, lambda g, y: g * (ONE - y**2), [call.value(0), call.value(1)], numeric_type(call))


@lowers("sigmoid_backward")
def lower_sigmoid_backward(program: Program, call: Call) -> Value:
    return apply(program, lambda g, y: g * (ONE - y) * y, [call.value(0), call.value(1)], numeric_type(call))


@lowers("prims.convert_element_type", "_to_copy", "to.dtype")
def lower_cast(program: Program, call: Call) -> Value:
    return program.cast(call.value(0), call.type.dtype)


@lowers("clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy", "prims.clone", "prims.view_of")
def lower_same(program: Program, call: Call) -> Value:
    return call.value(0)


def full_like(program: Program, call: Call, fill: sympy.Expr) -> Value:
    found = call.type
    return program.generate(lambda _, __: fill, found.shape, found.dtype)


@lowers("full", "new_full", "scalar_tensor", "full_like")
def lower_full(program: Program, call: Call) -> Value:
    position = 0 if call.node.op.startswith("aten.scalar_tensor") else 2 if "new_full" in call.node.op else 1
    raw = call.plain(call.argument(position, "fill_value"))
    return full_like(program, call, number(raw))


@lowers("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones")
def lower_constant(program: Program, call: Call) -> Value:
    return full_like(program, call, ONE if "ones" in call.node.op else ZERO)


@lowers("arange", "prims.iota")
def lower_arange(program: Program, call: Call) -> Value:
    start: sympy.Expr = ZERO
    step: sympy.Expr = ONE
    if call.node.op.startswith("prims.iota"):
        start, step = call.number(-1, "start", 0), call.number(-1, "step", 1)
    elif call.node.op == "aten.arange.start":
        start = call.number(0)
    elif call.node.op == "aten.arange.start_step":
        start, step = call.number(0), call.number(2, "step", 1)
    found = call.type
    if not (start.is_Integer and step.is_Integer):
        raise NotRaised("a range of fractions")
    return program.generate(lambda _, at: start + step * at[0], found.shape, found.dtype)


@lowers("tril", "triu")
def lower_triangle(program: Program, call: Call) -> Value:
    value, diagonal = call.value(0), call.integer(1, "diagonal", 0)
    upper = call.node.op.startswith("aten.triu")

    def keep(elements: Any, at: Any) -> sympy.Expr:
        inside = (GreaterEqual if upper else LessEqual)(at[-1], at[-2] + diagonal)
        return Where(inside, elements[0], ZERO)

    return program.generate(keep, value.shape, value.dtype, value)
