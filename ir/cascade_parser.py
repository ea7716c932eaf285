"""Cascade text to ``Cascade``, by recursive descent into sympy nodes; nothing is ever evaluated as Python.

Grammar (``#`` starts a comment; one Einsum a line)::

    line       = TENSOR "[" indices "]" "=" [reduction] expression
    reduction  = ("sum" | "max" | "min" | "prod") "[" rank {"," rank} "]"
    expression = sum [("<" | "<=" | ">" | ">=" | "==" | "!=") sum]
    sum        = product {("+" | "-") product}
    product    = signed {("*" | "/") signed}
    signed     = {"-"} power
    power      = atom ["**" signed]
    atom       = NUMBER | "inf" | "nan" | "|" rank "|" | rank | CONSTANT | TENSOR "[" indices "]"
               | FUNCTION "(" expression {"," expression} ")" | "(" expression ")"

A tensor's or constant's name starts with a capital letter, a rank's with a small one. Numbers are read as exact
rationals.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import sympy

from ..errors import CascadeError
from .cascade import (
    COMPARISONS,
    IDENTITY,
    Cascade,
    Einsum,
    Maximum,
    Minimum,
    Relu,
    Round,
    Sigmoid,
    Where,
    access,
    check,
    check_ranks,
    constant,
    is_rank,
    rank,
    ranks_of,
    size,
)

_TOKEN = re.compile(
    r"(?P<space>[ \t\r]+)|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<symbol>\*\*|<=|>=|==|!=|[-+*/<>=,()\[\]|])"
)
_FUNCTIONS: dict[str, tuple[int, Callable[..., sympy.Expr]]] = {
    "where": (3, Where),
    "exp": (1, sympy.exp),
    "log": (1, sympy.log),
    "tanh": (1, sympy.tanh),
    "sigmoid": (1, Sigmoid),
    "sqrt": (1, sympy.sqrt),
    "rsqrt": (1, lambda x: x ** sympy.Rational(-1, 2)),
    "abs": (1, sympy.Abs),
    "relu": (1, Relu),
    "round": (1, Round),
    "max": (2, Maximum),
    "min": (2, Minimum),
}
#: The remedy of errors that have no more particular one.
_LINE_FORM = "A line reads  NAME[ranks] = reduction[ranks] expression , such as  SD[m] = sum[n] exp(QK[m,n] - GM[m])"
_INDEX_FORM = "An index is a rank, or ranks times whole numbers or constants: K[c*B+j,d], X[2*n+1]."
_RESERVED = {*_FUNCTIONS, *IDENTITY, "inf", "nan"}
#: Refused beyond this many characters, digits of an exponent, or levels of nesting: nothing sensible needs more.
_MAX_TEXT, _MAX_EXPONENT, _MAX_DEPTH, _MAX_BITS = 1_000_000, 400, 60, 16384


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    column: int


def parse_cascade(text: str, name: str = "cascade") -> Cascade:
    """Read a cascade.

    Raises ``CascadeError`` with ``where`` = ``name:line:column`` and a remedy for text that does not fit the grammar or
    does not make a well-formed cascade (a tensor read before it is written, a rank neither kept nor reduced).
    """
    if len(text) > _MAX_TEXT:
        raise CascadeError("the text is too long", where=f"{name}:1:1", remedy=f"At most {_MAX_TEXT} characters.")
    einsums: list[Einsum] = []
    starts: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        tokens = _tokenize(line.split("#", 1)[0], name, number)
        if len(tokens) > 1:
            einsums.append(_LineParser(tokens, name, number).einsum())
            starts.append(tokens[0].column)
            try:
                # What one line can break by itself is told at once, so that the first bad line is the one reported.
                check_ranks(einsums[-1], str(number))
            except CascadeError as error:
                raise CascadeError(error.message, where=f"{name}:{number}:{starts[-1]}", remedy=error.remedy) from error
    cascade = Cascade(tuple(einsums))
    try:
        check(cascade)
    except CascadeError as error:
        where, column = _blame(cascade, error, starts)
        raise CascadeError(error.message, where=f"{name}:{where}:{column}", remedy=error.remedy) from error
    return cascade


def _blame(cascade: Cascade, error: CascadeError, starts: list[int]) -> tuple[int, int]:
    for einsum, column in zip(cascade.einsums, starts, strict=True):
        if error.where in (f"line {einsum.line}", einsum.output):
            return einsum.line, column
    return 1, 1


def _tokenize(line: str, name: str, number: int) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while position < len(line):
        match = _TOKEN.match(line, position)
        if match is None:
            raise CascadeError(
                f"unexpected character {line[position]!r}", where=f"{name}:{number}:{position + 1}", remedy=_LINE_FORM
            )
        if match.lastgroup != "space":
            tokens.append(_Token(str(match.lastgroup), match.group(), position + 1))
        position = match.end()
    tokens.append(_Token("end", "end of line", len(line.rstrip()) + 1))
    return tokens


class _LineParser:
    """Recursive descent over one line's tokens."""

    def __init__(self, tokens: list[_Token], name: str, line: int) -> None:
        self.tokens, self.name, self.line = tokens, name, line
        self.position = 0
        self.depth = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.position]

    def fail(self, message: str, token: _Token | None = None, remedy: str = "") -> CascadeError:
        column = (token or self.token).column
        return CascadeError(message, where=f"{self.name}:{self.line}:{column}", remedy=remedy or _LINE_FORM)

    def take(self) -> _Token:
        token = self.token
        if token.kind != "end":
            self.position += 1
        return token

    def accept(self, *texts: str) -> str | None:
        if self.token.kind == "symbol" and self.token.text in texts:
            return self.take().text
        return None

    def expect(self, text: str) -> None:
        if self.accept(text) is None:
            raise self.fail(f"expected '{text}', found {self.token.text!r}")

    def expect_end(self) -> None:
        if self.token.kind != "end":
            raise self.fail(f"unexpected {self.token.text!r}")

    def einsum(self) -> Einsum:
        name = self.tensor()
        start = self.position
        indices = self.indices()
        for index in indices:
            self.check_output_index(index, self.tokens[start])
        if len([index for index in indices if not index.is_Symbol]) > 1:
            raise self.fail("only one rank can be iterative", self.tokens[start])
        self.expect("=")
        reduction, reduced = self.reduction()
        first = self.token
        body = self.expression()
        self.expect_end()
        if body.has(sympy.zoo, sympy.I):
            raise self.fail(
                "the expression has no real value", first, "A logarithm or root of a negative number, or of 0?"
            )
        return Einsum(name, indices, body, reduction, reduced, self.line)

    def tensor(self) -> str:
        token = self.take()
        if token.kind != "name" or not token.text[0].isupper():
            raise self.fail(
                f"expected a tensor, found {token.text!r}", token, "A tensor's name starts with a capital letter."
            )
        return token.text

    def check_output_index(self, index: sympy.Expr, token: _Token) -> None:
        if index.is_Symbol and is_rank(index):
            return
        if index.is_Integer:
            return
        ranks = ranks_of(index)
        if len(ranks) == 1 and index == next(iter(ranks)) + 1:
            return
        raise self.fail("an output index is a rank, a rank + 1 (its step) or a number (its start)", token)

    def reduction(self) -> tuple[str | None, tuple[sympy.Symbol, ...]]:
        token, following = self.token, self.tokens[min(self.position + 1, len(self.tokens) - 1)]
        if token.kind != "name" or token.text not in IDENTITY or following.text != "[":
            return None, ()
        self.take()
        self.expect("[")
        reduced = [self.rank()]
        while self.accept(","):
            reduced.append(self.rank())
        self.expect("]")
        if len(set(reduced)) != len(reduced):
            raise self.fail("a rank is reduced twice", token)
        return token.text, tuple(reduced)

    def rank(self) -> sympy.Symbol:
        token = self.take()
        if token.kind != "name" or not (token.text[0].islower() or token.text[0] == "_") or token.text in _RESERVED:
            raise self.fail(f"expected a rank, found {token.text!r}", token, "A rank's name is in lower case.")
        return rank(token.text)

    def indices(self) -> tuple[sympy.Expr, ...]:
        self.expect("[")
        if self.accept("]"):
            return ()
        found = [self.index()]
        while self.accept(","):
            found.append(self.index())
        self.expect("]")
        return tuple(found)

    def index(self) -> sympy.Expr:
        token = self.token
        index = self.sum()
        ranks = sorted(ranks_of(index), key=lambda symbol: symbol.name)
        if any(not node.is_Symbol and not node.is_Integer for node in index.atoms()) or index.has(sympy.Function):
            raise self.fail("an index is affine in its ranks, with whole coefficients", token, _INDEX_FORM)
        if ranks:
            # Only a polynomial of degree one in the ranks, with whole coefficients, addresses elements.
            if not index.is_polynomial(*ranks) or sympy.Poly(index, *ranks).total_degree() > 1:
                raise self.fail("an index is affine in its ranks, with whole coefficients", token, _INDEX_FORM)
            coefficients = sympy.Poly(index, *ranks).coeffs()
        else:
            coefficients = [index]
        if any(coefficient.is_integer is not True for coefficient in coefficients):
            raise self.fail("an index is affine in its ranks, with whole coefficients", token, _INDEX_FORM)
        return index

    def expression(self) -> sympy.Expr:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.fail("nested too deeply")
        left = self.sum()
        operator = self.accept(*COMPARISONS)
        if operator:
            left = COMPARISONS[operator](left, self.sum())
            if self.token.text in COMPARISONS:
                raise self.fail("comparisons do not chain", remedy="Nest them with where(...).")
        self.depth -= 1
        return left

    def sum(self) -> sympy.Expr:
        value = self.product()
        while operator := self.accept("+", "-"):
            right = self.product()
            value = value + right if operator == "+" else value - right
        return value

    def product(self) -> sympy.Expr:
        # All factors at once: sympy would distribute 2 over (a - b) if it met that product first.
        factors = self.signed()
        while operator := self.accept("*", "/"):
            token = self.token
            right = self.signed()
            if operator == "*":
                factors += right
            elif 0 in right:
                raise self.fail("division by zero", token)
            else:
                factors += [1 / factor for factor in right]
        return sympy.Mul(*factors)

    def signed(self) -> list[sympy.Expr]:
        """A power and the minus signs before it, as factors."""
        signs: list[sympy.Expr] = []
        while self.accept("-"):
            signs.append(sympy.Integer(-1))
        return [*signs, self.power()]

    def power(self) -> sympy.Expr:
        base = self.atom()
        if self.accept("**") is None:
            return base
        token = self.token
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.fail("nested too deeply")
        exponent = sympy.Mul(*self.signed())
        self.depth -= 1
        if exponent.is_number and not exponent.has(sympy.oo, sympy.nan) and abs(exponent) > _MAX_EXPONENT:
            raise self.fail("the exponent is too large", token, f"At most {_MAX_EXPONENT}.")
        bits = max(int(base.p).bit_length(), int(base.q).bit_length()) if base.is_Rational and base.is_finite else 0
        if exponent.is_Rational and bits * abs(int(exponent)) > _MAX_BITS:
            raise self.fail("the power is too large", token, f"At most {_MAX_BITS} bits.")
        if base == 0 and exponent.is_number and exponent.is_negative:
            raise self.fail("division by zero", token)
        return base**exponent

    def atom(self) -> sympy.Expr:
        token = self.take()
        if token.kind == "number":
            return self.number(token)
        if token.text == "(":
            value = self.expression()
            self.expect(")")
            return value
        if token.text == "|":
            symbol = self.rank()
            self.expect("|")
            return size(symbol.name)
        if token.kind != "name":
            raise self.fail(f"expected an expression, found {token.text!r}", token)
        if token.text == "inf":
            return sympy.oo
        if token.text == "nan":
            return sympy.nan
        if self.token.text == "(":
            return self.call(token)
        if token.text[0].isupper():
            if self.token.text == "[":
                return access(token.text, self.indices())
            return constant(token.text)
        if token.text in _RESERVED:
            raise self.fail(f"{token.text} is a function", token, "Write a reduction in front: sum[n] X[n].")
        return rank(token.text)

    def number(self, token: _Token) -> sympy.Expr:
        _, _, exponent = token.text.lower().partition("e")
        if len(token.text) > _MAX_EXPONENT or (exponent and abs(int(exponent)) > _MAX_EXPONENT):
            raise self.fail("the number is too large", token, f"At most {_MAX_EXPONENT} digits.")
        return sympy.Rational(token.text)

    def call(self, token: _Token) -> sympy.Expr:
        if token.text not in _FUNCTIONS:
            known = ", ".join(sorted(_FUNCTIONS))
            raise self.fail(f"unknown function {token.text}", token, f"Known: {known}.")
        count, build = _FUNCTIONS[token.text]
        self.expect("(")
        arguments = [self.expression()]
        while self.accept(","):
            arguments.append(self.expression())
        self.expect(")")
        if len(arguments) != count:
            raise self.fail(f"{token.text} takes {count} argument(s), not {len(arguments)}", token)
        return build(*arguments)
