"""Reads size expressions: sums, products, powers and the named functions of ``expressions``; nothing else exists."""

from __future__ import annotations

import re
from typing import Any

import sympy

from . import expressions
from .scanner import Scanner

_FLOAT = re.compile(r"(?:[0-9]+\.[0-9]*(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+|inf\b|nan\b)")
_INTEGER = re.compile(r"[0-9]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

#: Longest number, in digits, and most operands of one expression.
MAX_DIGITS = 4000
MAX_OPERANDS = 4096


class ExpressionParser:
    """Recursive descent over a scanner.

    sum: product (("+" | "-") product)*;  product: ["-"] power (("*" | "/") power)*;  power: atom ["**" atom]
    """

    def __init__(self, scanner: Scanner) -> None:
        self.scanner = scanner
        self.operands = 0

    def parse(self) -> Any:
        """A number (``int`` or ``float``) or a canonical sympy expression."""
        start = self.scanner.skip()
        self.operands = 0
        try:
            value = self._sum()
            return value if isinstance(value, int | float) else expressions.canonical(value)
        except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError) as error:
            self.scanner.fail(f"not a valid expression: {error}", start)

    def _sum(self) -> Any:
        self.scanner.descend()
        terms = [self._product(self.scanner.take("-"))]
        while True:
            if self.scanner.take("+"):
                terms.append(self._product(False))
            elif self.scanner.take("-"):
                terms.append(self._product(True))
            else:
                break
        self.scanner.ascend()
        return terms[0] if len(terms) == 1 else sympy.Add(*map(_number, terms))

    def _product(self, negative: bool) -> Any:
        factors = [self._power()]
        while True:
            if self.scanner.peek("**"):
                self.scanner.fail("write a power of a power with brackets")
            if self.scanner.take("*"):
                factors.append(self._power())
            elif self.scanner.take("/"):
                factors.append(sympy.Pow(_number(self._power()), -1))
            else:
                break
        if len(factors) == 1:
            value = factors[0]
            if not negative:
                return value
            return -value if isinstance(value, int | float) else sympy.Mul(-1, value)
        # All factors at once: sympy would distribute 2 over (s0 + 1) if it met that product first.
        return sympy.Mul(*([-1] if negative else []), *map(_number, factors))

    def _power(self) -> Any:
        base = self._atom()
        return expressions.power(_number(base), _number(self._atom())) if self.scanner.take("**") else base

    def _atom(self) -> Any:
        scanner = self.scanner
        self.operands += 1
        if self.operands > MAX_OPERANDS:
            scanner.fail(f"the expression has more than {MAX_OPERANDS} operands")
        if scanner.take("("):
            value = self._sum()
            scanner.expect(")", "to close the bracket")
            return value
        if (text := scanner.match(_FLOAT)) is not None:
            return float(text)
        if (text := scanner.match(_INTEGER)) is not None:
            if len(text) > MAX_DIGITS:
                scanner.fail(f"the number has {len(text)} digits; at most {MAX_DIGITS} are read")
            return int(text)
        if scanner.take("$"):
            name = scanner.string()
            return expressions.symbol(name) if name is not None else scanner.fail("expected a quoted name after '$'")
        start = scanner.skip()
        name = scanner.match(_NAME)
        if name is None:
            scanner.fail("expected a value")
        if scanner.take("("):
            return self._call(name, start)
        if name in expressions.CONSTANTS:
            return expressions.CONSTANTS[name]
        if name in expressions.RESERVED:
            scanner.fail(f"'{name}' is not a size", start)
        return expressions.symbol(name)

    def _call(self, name: str, start: int) -> Any:
        function = expressions.function_named(name)
        if function is None:
            self.scanner.fail(f"there is no function '{name}'", start)
        arguments = []
        if not self.scanner.take(")"):
            arguments.append(_number(self._sum()))
            while self.scanner.take(","):
                arguments.append(_number(self._sum()))
            self.scanner.expect(")", f"to close {name}(")
        return expressions.apply(function, arguments)


def _number(value: Any) -> Any:
    """Python numbers become sympy's, so that operators build expressions."""
    if isinstance(value, int):
        return sympy.Integer(value)
    return sympy.Float(value) if isinstance(value, float) else value
