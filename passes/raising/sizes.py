"""Arithmetic of sizes: ints, or sympy expressions over the graph's size symbols."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from ...ir.cascade import constant
from ...ir.types import Size


def simple(size: Size) -> Size:
    """A sympy integer as an int."""
    return int(size) if isinstance(size, sympy.Integer | int) else size


def equal(a: Size, b: Size) -> bool:
    """Whether two sizes are certainly equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` if it is certainly a whole number, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if b == 0:
        return None
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = quotient.as_numer_denom()
    if denominator != 1:
        return None
    whole = all(number.is_Integer for number in numerator.as_coefficients_dict().values())
    return simple(quotient) if whole and numerator.is_polynomial(*numerator.free_symbols) else None


def product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    return simple(total)


def in_cascade(size: Size) -> sympy.Expr:
    """A size as a number of the cascade language: a graph symbol ``s0`` becomes the named constant ``S0``."""
    if isinstance(size, int):
        return sympy.Integer(size)
    return size.xreplace({symbol: constant(constant_name(symbol)) for symbol in size.free_symbols})


def constant_name(symbol: sympy.Symbol) -> str:
    return f"S_{symbol.name}"


def known_polynomial(size: Size) -> bool:
    """Whether the size can be written in a cascade: a number, or a polynomial over size symbols."""
    if isinstance(size, int):
        return True
    free = size.free_symbols
    return bool(size.is_polynomial(*free)) and not size.atoms(sympy.Function)
