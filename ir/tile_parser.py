"""Tile program text to ``Program``. The expressions are parsed as in cascades; nothing is evaluated as Python."""

from __future__ import annotations

import sympy
from sympy.core.function import AppliedUndef

from ..errors import CascadeError, ParseError
from .cascade import IDENTITY
from .cascade import rank as rank_symbol
from .cascade_parser import _LineParser as LineParser
from .cascade_parser import _tokenize as tokenize
from .tile import (
    BUFFER,
    COMPUTE_DTYPES,
    DTYPES,
    GRID,
    INPUT,
    OUTPUT,
    SEQUENTIAL,
    UNROLLED,
    Carry,
    Cases,
    Dot,
    Load,
    Loop,
    Map,
    Program,
    Reduce,
    Skip,
    State,
    Statement,
    Store,
    Tensor,
)

_PLAIN: dict[str, type[Map] | type[State] | type[Carry] | type[Store]] = {
    "map": Map,
    "state": State,
    "carry": Carry,
    "store": Store,
}


def parse_program(text: str, name: str = "program") -> Program:
    """Read a tile program. Raises ``ParseError`` with ``where`` = ``name:line:column`` and what was expected."""
    try:
        return _ProgramParser(text, name).program()
    except CascadeError as error:
        raise ParseError(error.message, where=error.where, remedy=error.remedy) from error


class _ProgramParser:
    def __init__(self, text: str, name: str) -> None:
        self.lines: list[_Line] = []
        for number, line in enumerate(text.split("\n"), start=1):
            # Braces belong to tile programs only; the cascade language's tokens are used for the rest.
            plain, braces = _braces(line.split("#", 1)[0])
            tokens = tokenize(plain, name, number)
            if len(tokens) > 1 or braces:
                self.lines.append(_Line(LineParser(tokens, name, number), braces))
        self.name = name
        self.position = 0

    def program(self) -> Program:
        head = self.next("a line 'program NAME in f32'")
        head.word("program")
        name = head.parser.take().text
        head.word("in")
        compute = head.one_of(COMPUTE_DTYPES)
        head.end()
        tensors: list[Tensor] = []
        while self.word() in (INPUT, OUTPUT, BUFFER):
            tensors.append(self.tensor())
        alias: list[tuple[sympy.Symbol, sympy.Symbol]] = []
        while self.word() == "size":
            line = self.next("a size")
            line.word("size")
            rank = line.parser.rank()
            line.parser.expect("=")
            alias.append((rank, line.parser.rank()))
            line.end()
        body = self.body(nested=False)
        return Program(name, tuple(tensors), body, compute, tuple(alias))

    def word(self) -> str:
        return self.lines[self.position].parser.token.text if self.position < len(self.lines) else ""

    def next(self, wanted: str) -> _Line:
        if self.position >= len(self.lines):
            raise ParseError(f"the program ends where {wanted} was expected", where=self.name)
        self.position += 1
        return self.lines[self.position - 1]

    def tensor(self) -> Tensor:
        line = self.next("a tensor")
        role, name = line.parser.take().text, line.parser.tensor()
        ranks = line.ranks()
        # The cascade language has no colon; it was replaced by a comma before the line was cut into tokens.
        line.parser.expect(",")
        dtype = line.one_of(DTYPES)
        unit = None
        if line.parser.token.text == "unit":
            line.parser.take()
            token = line.parser.token
            chosen = line.parser.rank()
            if chosen not in ranks:
                raise line.parser.fail(f"{name} has no rank {chosen}", token, "Name one of its ranks.")
            unit = ranks.index(chosen)
        line.end()
        return Tensor(name, ranks, dtype, role, unit)

    def body(self, nested: bool) -> tuple[Statement, ...]:
        found: list[Statement] = []
        while self.position < len(self.lines):
            if nested and self.lines[self.position].braces.startswith("}"):
                return tuple(found)
            found.append(self.statement())
        if nested:
            raise ParseError("a block is not closed", where=self.name, remedy="Add '}'.")
        return tuple(found)

    def statement(self) -> Statement:
        line = self.next("a statement")
        parser = line.parser
        token = parser.take()
        if token.text in (GRID, SEQUENTIAL, UNROLLED):
            rank = parser.rank()
            line.word("step")
            step, part, length = line.count(), None, 0
            if parser.token.text == "part":
                parser.take()
                part = parser.rank()
                line.word("of")
                length = line.count()
            line.end("{")
            body = self.body(nested=True)
            self.close("}")
            return Loop(token.text, rank, step, body, part, length)
        if token.text == "if":
            line.word("all")
            condition = parser.expression()
            line.end("{")
            full = self.body(nested=True)
            self.close("}{")
            partial = self.body(nested=True)
            self.close("}")
            return Cases(condition, full, partial)
        if token.text == "skip":
            line.word("unless")
            condition, holds = parser.expression(), None
            if parser.token.text == "while":
                parser.take()
                holds = parser.expression()
            line.end()
            return Skip(condition, holds)
        item = self.simple(token.text, line)
        line.end()
        return item

    def simple(self, word: str, line: _Line) -> Statement:
        parser = line.parser
        if word not in (*_PLAIN, "load", "dot", "reduce"):
            raise parser.fail(f"unknown statement {word!r}", remedy="One of load, dot, map, reduce, carry, store, ...")
        target = line.access()
        sign = parser.take().text
        accumulate = sign in IDENTITY
        if accumulate:
            parser.expect("=")
        elif sign != "=":
            raise parser.fail("expected '='")
        if accumulate and word not in ("dot", "reduce"):
            raise parser.fail("only dot and reduce accumulate")
        if word == "load":
            return Load(target, line.access())
        if word in _PLAIN:
            return _PLAIN[word](target, parser.expression())
        reduction, reduced = parser.reduction()
        if reduction is None or (accumulate and sign != reduction) or (word == "dot" and reduction != "sum"):
            raise parser.fail("expected a reduction such as sum[n], the same one before '=' if there is one")
        if word == "reduce":
            return Reduce(target, reduction, reduced, parser.expression(), accumulate)
        left = line.access()
        parser.expect("*")
        return Dot(target, reduced, left, line.access(), accumulate)

    def close(self, braces: str) -> None:
        line = self.next("'}'")
        if line.braces != braces or (braces == "}{" and line.parser.take().text != "else"):
            raise line.parser.fail(f"expected '{' else '.join(braces)}'")
        line.parser.expect_end()


class _Line:
    """One line's tokens, and its braces, which are no tokens."""

    def __init__(self, parser: LineParser, braces: str) -> None:
        self.parser, self.braces = parser, braces

    def word(self, text: str) -> None:
        if self.parser.take().text != text:
            raise self.parser.fail(f"expected '{text}'")

    def one_of(self, words: tuple[str, ...]) -> str:
        token = self.parser.take()
        if token.text not in words:
            raise self.parser.fail(f"expected one of {', '.join(words)}, found {token.text!r}", token)
        return token.text

    def ranks(self) -> tuple[sympy.Symbol, ...]:
        found = self.parser.indices()
        for index in found:
            if not index.is_Symbol:
                raise self.parser.fail(f"{index} is no rank")
        return tuple(rank_symbol(index.name) for index in found)

    def count(self) -> int:
        token = self.parser.take()
        number = self.parser.number(token) if token.kind == "number" else sympy.S.Zero
        if not number.is_Integer or number < 1:
            raise self.parser.fail("expected a whole number from 1 on", token)
        return int(number)

    def access(self) -> AppliedUndef:
        token = self.parser.token
        found = self.parser.atom()
        if not isinstance(found, AppliedUndef):
            raise self.parser.fail("expected an access such as Q[m,d]", token)
        return found

    def end(self, braces: str = "") -> None:
        self.parser.expect_end()
        if self.braces != braces:
            raise self.parser.fail(f"expected {braces!r} at the end of the line" if braces else "unexpected brace")


def _braces(line: str) -> tuple[str, str]:
    """A line without its braces, and the braces; a colon (before a type) becomes a comma."""
    braces = "".join(character for character in line if character in "{}")
    for character in "{}":
        line = line.replace(character, " ")
    return line.replace(":", ",", 1), braces
