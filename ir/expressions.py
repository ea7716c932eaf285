"""Symbolic sizes: the sympy vocabulary of the IR, its text form, and how an expression becomes canonical.

Torch's symbolic shapes use their own sympy functions (``torch.utils._sympy.functions``). The IR must be read where
torch is not imported, so each has a neutral twin here with the same name. An expression in a graph is *canonical*:
built from ``symbol(name)``, Python-sized numbers, sympy's Add, Mul and Pow, and the functions of ``FUNCTIONS``.
``canonical`` makes any expression so; the parser builds only such.
"""

from __future__ import annotations

import math
import re
from functools import cache, lru_cache
from typing import Any, TypeAlias

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from .text import quote

Value: TypeAlias = "sympy.Basic | int | float"

#: No number in an expression may have more bits than this: ``9**9**9`` is refused, not computed.
MAX_BITS = 16384


class ExpressionError(ValueError):
    """An expression cannot be printed or built; the message says which part."""


@cache
def symbol(name: str) -> sympy.Symbol:
    """The IR's one symbol of that name: an integer (``u0`` may be negative); names that begin with ``z`` are floats."""
    if name.startswith(("zf", "zuf")):
        return sympy.Symbol(name, real=True)
    return sympy.Symbol(name, integer=True)


def _integers(*arguments: sympy.Basic) -> bool:
    return all(isinstance(argument, sympy.Integer) for argument in arguments)


def _numbers(*arguments: sympy.Basic) -> bool:
    return all(isinstance(argument, sympy.Number) and argument.is_finite for argument in arguments)


class _Sized(sympy.Function):  # type: ignore[misc] # sympy has no types
    """A function of sizes. It folds only plain numbers, so that building one from its text gives the same one."""

    @classmethod
    def fold(cls, *arguments: Any) -> Any:
        """Its value for number arguments, or None to stay symbolic."""
        return None

    @classmethod
    def eval(cls, *arguments: Any) -> Any:
        return cls.fold(*arguments) if _numbers(*arguments) else None


class _IntegerValued(_Sized):
    is_integer = True
    is_real = True


class FloorDiv(_IntegerValued):
    """``a // b``, rounded towards minus infinity."""

    @classmethod
    def fold(cls, a: Any, b: Any) -> Any:
        return a // b if _integers(a, b) and b != 0 else None

    @classmethod
    def eval(cls, *arguments: Any) -> Any:
        if len(arguments) == 2 and arguments[1] == 1 and isinstance(arguments[1], sympy.Integer):
            return arguments[0]
        return super().eval(*arguments)


class CleanDiv(FloorDiv):
    """``a // b`` where b is known to divide a."""


class CeilDiv(_IntegerValued):
    @classmethod
    def fold(cls, a: Any, b: Any) -> Any:
        return -(-a // b) if _integers(a, b) and b != 0 else None


class ModularIndexing(_IntegerValued):
    """``(a // b) % c``."""

    @classmethod
    def fold(cls, a: Any, b: Any, c: Any) -> Any:
        return (a // b) % c if _integers(a, b, c) and b != 0 and c != 0 else None


class Mod(_IntegerValued):
    """Remainder of non-negative integers."""

    @classmethod
    def fold(cls, a: Any, b: Any) -> Any:
        return a % b if _integers(a, b) and b != 0 else None


class PythonMod(Mod):
    """Remainder with the divisor's sign, as Python's ``%``."""


class LShift(_IntegerValued):
    @classmethod
    def fold(cls, a: Any, b: Any) -> Any:
        return a * 2**b if _integers(a, b) and 0 <= b <= 1024 else None


class RShift(_IntegerValued):
    @classmethod
    def fold(cls, a: Any, b: Any) -> Any:
        return a // 2**b if _integers(a, b) and 0 <= b <= 1024 else None


class PowByNatural(_IntegerValued):
    @classmethod
    def fold(cls, a: Any, b: Any) -> Any:
        return a**b if _integers(a, b) and b >= 0 and int(a).bit_length() * int(b) <= MAX_BITS else None


class CeilToInt(_IntegerValued):
    @classmethod
    def fold(cls, a: Any) -> Any:
        return sympy.Integer(math.ceil(a))


class FloorToInt(_IntegerValued):
    @classmethod
    def fold(cls, a: Any) -> Any:
        return sympy.Integer(math.floor(a))


class TruncToInt(_IntegerValued):
    @classmethod
    def fold(cls, a: Any) -> Any:
        return sympy.Integer(math.trunc(a))


class RoundToInt(_IntegerValued):
    @classmethod
    def fold(cls, a: Any) -> Any:
        return sympy.Integer(round(float(a)))


class IsNonOverlappingAndDenseIndicator(_IntegerValued):
    """1 if sizes and strides (all sizes, then all strides) describe a permuted contiguous tensor."""


class TruncToFloat(_Sized):
    is_real = True


class RoundDecimal(_Sized):
    is_real = True


class ToFloat(_Sized):
    is_real = True


class FloatPow(_Sized):
    is_real = True


class FloatTrueDiv(_Sized):
    """``a / b`` of floats."""

    is_real = True

    @classmethod
    def fold(cls, a: Any, b: Any) -> Any:
        return sympy.Float(float(a) / float(b)) if b != 0 else None


class IntTrueDiv(_Sized):
    """``a / b`` of integers, a float."""

    is_real = True

    @classmethod
    def fold(cls, a: Any, b: Any) -> Any:
        return sympy.Float(int(a) / int(b)) if _integers(a, b) and b != 0 else None


class Where(_Sized):
    """``Where(condition, a, b)``."""

    @classmethod
    def eval(cls, condition: Any, a: Any, b: Any) -> Any:
        if condition is sympy.true:
            return a
        return b if condition is sympy.false else None


class Identity(_Sized):
    """Its argument; torch uses it to stop simplification."""


class _Extremum(_Sized):
    is_real = True

    @classmethod
    def choose(cls, values: list[Any]) -> Any:
        raise NotImplementedError

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        flat: list[Any] = []
        for argument in map(sympy.sympify, arguments):
            flat += argument.args if isinstance(argument, cls) else [argument]
        numbers = [argument for argument in flat if _numbers(argument)]
        rest = {argument for argument in flat if not _numbers(argument)}
        chosen = [cls.choose(numbers)] if numbers else []
        ordered = chosen + sorted(rest, key=sympy.default_sort_key)
        return ordered[0] if len(ordered) == 1 else super().__new__(cls, *ordered, **options)

    def _eval_is_integer(self) -> bool | None:
        return True if all(argument.is_integer for argument in self.args) else None


class Max(_Extremum):
    @classmethod
    def choose(cls, values: list[Any]) -> Any:
        return max(values)


class Min(_Extremum):
    @classmethod
    def choose(cls, values: list[Any]) -> Any:
        return min(values)


def _opaque(name: str, parent: type[_Sized] = _Sized) -> type[_Sized]:
    return type(name, (parent,), {"__doc__": f"Torch's {name}, kept symbolic.", "is_real": True})


#: Torch's OpaqueUnaryFn_* family.
_OPAQUE_UNARY = "sqrt cos cosh sin sinh tan tanh asin acos atan exp log asinh log2".split()

#: The functions of the language, by name.
FUNCTIONS: dict[str, Any] = {
    function.__name__: function
    for function in (
        FloorDiv, CleanDiv, CeilDiv, ModularIndexing, Mod, PythonMod, LShift, RShift, PowByNatural, CeilToInt,
        FloorToInt, TruncToInt, RoundToInt, IsNonOverlappingAndDenseIndicator, TruncToFloat, RoundDecimal, ToFloat,
        FloatPow, FloatTrueDiv, IntTrueDiv, Where, Identity, Max, Min,
    )
} | {name: _opaque(name) for name in (f"OpaqueUnaryFn_{unary}" for unary in _OPAQUE_UNARY)} | {
    name: _opaque(name, _IntegerValued)
    for name in ("BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or", "BitwiseFn_bitwise_xor")
}  # fmt: skip

#: sympy's own functions, kept as they are: name in the text -> class.
_SYMPY_FUNCTIONS: dict[str, Any] = {"floor": sympy.floor, "ceiling": sympy.ceiling, "Abs": sympy.Abs}

#: Conditions: name in the text -> class. Built unevaluated, operands in the order written.
CONDITIONS: dict[str, Any] = {
    "Eq": sympy.Eq, "Ne": sympy.Ne, "Lt": sympy.Lt, "Le": sympy.Le, "Gt": sympy.Gt, "Ge": sympy.Ge,
    "And": sympy.And, "Or": sympy.Or, "Not": sympy.Not,
}  # fmt: skip
_CONDITION_NAMES = {cls: name for name, cls in CONDITIONS.items()}

#: Names with a meaning; a symbol called like one is printed quoted (``$"inf"``).
CONSTANTS: dict[str, Any] = {
    "oo": sympy.oo,
    "zoo": sympy.zoo,
    "true": sympy.true,
    "false": sympy.false,
    "undefined": sympy.nan,
}
RESERVED = {
    *FUNCTIONS, *_SYMPY_FUNCTIONS, *CONDITIONS, *CONSTANTS, "inf", "nan", "True", "False", "None", "torch", "device",
    "symbol", "complex", "dict", "slice", "list",
}  # fmt: skip
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def function_named(name: str) -> Any:
    """The function or condition of that name, or None."""
    return FUNCTIONS.get(name) or _SYMPY_FUNCTIONS.get(name) or CONDITIONS.get(name)


def apply(function: Any, arguments: list[Any]) -> Any:
    """``function(*arguments)`` the canonical way: conditions are kept as written."""
    if isinstance(function, type) and issubclass(function, Relational):
        if len(arguments) != 2:
            raise ExpressionError(f"{function.__name__} takes 2 operands, not {len(arguments)}")
        return function(*arguments, evaluate=False)
    if function in (sympy.And, sympy.Or, sympy.Not):
        if not all(isinstance(argument, Boolean) for argument in arguments):
            raise ExpressionError("And, Or and Not take conditions")
        return function(*arguments, evaluate=False) if arguments else function(*arguments)
    return function(*arguments)


def power(base: Any, exponent: Any) -> Any:
    """``base ** exponent``, refusing what would have more than ``MAX_BITS`` bits."""
    # sympify turns the int or float into a sympy number here; it never sees text.
    base, exponent = sympy.sympify(base), sympy.sympify(exponent)
    scale = sum(int(abs(number)) + 1 for number in exponent.atoms(sympy.Integer)) if exponent.args else 0
    if exponent.is_Integer:
        scale = abs(int(exponent))
    elif exponent.is_Rational:
        scale = abs(int(exponent.p)) + int(exponent.q)
    bits = sum(int(number.p).bit_length() + int(number.q).bit_length() for number in base.atoms(sympy.Rational))
    if scale > 1024 or bits * max(scale, 1) > MAX_BITS:
        raise ExpressionError("a power is too large")
    return sympy.Pow(base, exponent)


def canonical(expression: Value) -> Any:
    """The same expression in the IR's vocabulary; an integer comes back as ``int``, a bare float as ``float``.

    Torch's functions are recognised by their class name. Raises ``ExpressionError`` for a function that is unknown.
    """
    if isinstance(expression, int | float):
        return expression
    built = _canonical(expression)
    if isinstance(built, sympy.Integer):
        return int(built)
    return float(built) if isinstance(built, sympy.Float) else built


@lru_cache(maxsize=65536)
def _canonical(expression: sympy.Basic) -> sympy.Basic:
    if isinstance(expression, sympy.Symbol):
        return symbol(expression.name)
    name = type(expression).__name__
    if name in ("IntInfinity", "Infinity"):
        return sympy.oo
    if name in ("NegativeIntInfinity", "NegativeInfinity"):
        return -sympy.oo
    if isinstance(expression, sympy.Float):
        return sympy.Float(float(expression))
    if isinstance(expression, sympy.Number) or expression in (sympy.true, sympy.false, sympy.zoo):
        return expression
    arguments = [_canonical(argument) for argument in expression.args]
    if isinstance(expression, sympy.Pow):
        return power(*arguments)
    if isinstance(expression, sympy.Add | sympy.Mul):
        built: sympy.Basic = expression.func(*arguments)
        return built
    condition = _CONDITION_NAMES.get(type(expression))
    function = CONDITIONS[condition] if condition else function_named(name)
    if function is None:
        raise ExpressionError(f"the size expression {expression} uses {name}, which the IR does not know")
    return apply(function, arguments)


# Text ----------------------------------------------------------------------------------------------------------------

_SUM, _PRODUCT, _UNARY, _POWER, _ATOM = range(5)


def print_expression(expression: Value) -> str:
    """The text of an int, float or sympy expression: ``2*s0 + 1``, ``FloorDiv(s0, 2)``, ``s0**2``, ``Eq(s0, 3)``."""
    if isinstance(expression, int):
        return str(int(expression))
    if isinstance(expression, float):
        return print_float(expression)
    return _print(expression)[0]


def print_float(number: float) -> str:
    """The shortest text that reads back as the same float: always with a point, an exponent, ``inf`` or ``nan``."""
    return repr(float(number))


def print_symbol_name(name: str) -> str:
    return name if _PLAIN_NAME.match(name) and name not in RESERVED else "$" + quote(name)


@lru_cache(maxsize=65536)
def _print(expression: sympy.Basic) -> tuple[str, int]:
    """Text and how tightly it binds."""
    if isinstance(expression, sympy.Symbol):
        return print_symbol_name(expression.name), _ATOM
    if isinstance(expression, sympy.Integer):
        return str(int(expression)), _ATOM if expression >= 0 else _UNARY
    if isinstance(expression, sympy.Rational):
        return f"{expression.p}/{expression.q}", _PRODUCT
    if isinstance(expression, sympy.Float):
        return print_float(float(expression)), _ATOM if expression >= 0 else _UNARY
    if expression == -sympy.oo:
        return "-oo", _UNARY
    for name, constant in CONSTANTS.items():
        if expression is constant:
            return name, _ATOM
    if isinstance(expression, sympy.Add):
        return _print_sum(expression), _SUM
    if isinstance(expression, sympy.Mul):
        return _print_product(expression), _PRODUCT
    if isinstance(expression, sympy.Pow):
        base, exponent = expression.args
        return f"{_at_least(base, _ATOM)}**{_at_least(exponent, _ATOM)}", _POWER
    name = _CONDITION_NAMES.get(type(expression)) or type(expression).__name__
    if function_named(name) is None:
        raise ExpressionError(f"cannot print {expression}: the IR does not know {name}")
    arguments = expression.args
    if name in ("And", "Or"):
        arguments = tuple(sorted(arguments, key=sympy.default_sort_key))
    return f"{name}({', '.join(_print(argument)[0] for argument in arguments)})", _ATOM


def _at_least(expression: sympy.Basic, level: int) -> str:
    text, binding = _print(expression)
    return text if binding >= level else f"({text})"


def _print_sum(expression: sympy.Add) -> str:
    text = ""
    for term in expression.as_ordered_terms():
        piece = _at_least(term, _PRODUCT)
        if not text:
            text = piece
        elif piece.startswith("-"):
            text += " - " + piece[1:]
        else:
            text += " + " + piece
    return text


def _print_product(expression: sympy.Mul) -> str:
    """``-3*s0/2``: a rational coefficient in front, its denominator behind; powers stay powers."""
    coefficient, rest = expression.as_coeff_mul()
    if isinstance(coefficient, sympy.Float):
        return "*".join([print_float(float(coefficient)), *(_at_least(factor, _POWER) for factor in rest)])
    factors = [_at_least(factor, _POWER) for factor in sorted(rest, key=sympy.default_sort_key)]
    sign = ""
    if isinstance(coefficient, sympy.Rational):
        sign = "-" if coefficient < 0 else ""
        if abs(coefficient.p) != 1:
            factors.insert(0, str(abs(int(coefficient.p))))
        text = sign + "*".join(factors)
        return text if coefficient.q == 1 else f"{text}/{coefficient.q}"
    return "*".join([_at_least(coefficient, _POWER), *factors])
