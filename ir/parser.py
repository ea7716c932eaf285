"""Reads the text form of a graph. Hand-written: no text is ever evaluated, and every limit is stated.

Whatever the text, the outcome is a ``Graph`` or a ``ParseError`` with line, column and the line itself. The graph is
not verified here; ``verifier.verify`` does that.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import sympy

from .expression_parser import ExpressionParser
from .fused_cascade import FusedCascade
from .fused_cascade_text import read_fused_cascade
from .graph import Alias, Argument, Graph, Location, Node, Ref, Repeat, Symbol
from .scanner import Scanner
from .types import DTYPES, NoneType, OpaqueType, ScalarType, Size, TensorType, TupleType, Type

_NAME = re.compile(r"[A-Za-z0-9_.]+")
_OP = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEYWORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?=\s*=)")
_FILE = re.compile(r"[A-Za-z0-9_./+-]+(?=:)")
_COUNT = re.compile(r"[0-9]{1,18}")
_DEVICE = re.compile(r"[a-z]+(?::[0-9]+)?")
_SYMBOL = re.compile(
    r"(?:torch(?:\.[A-Za-z_][A-Za-z0-9_]*)+|device\([a-z]+(?::[0-9]+)?\)|@[A-Za-z0-9_.]+|(?:dict|slice|list)\b)"
)
_SIMPLE_INT = re.compile(r"-?[0-9]{1,18}(?=[,\])}])")


def parse_graph(text: str, source: str = "") -> Graph:
    """The graph that ``text`` describes; ``source`` names it in errors (a file). Raises ``ParseError``."""
    parser = _Parser(text, source)
    graph = parser.graph()[1]
    if parser.scanner.skip() != len(text):
        parser.scanner.fail("expected the end of the text after the graph")
    return graph


@functools.lru_cache(maxsize=512)
def parse_fused_cascade(text: str) -> FusedCascade:
    """A fused cascade by itself, as ``fused_cascade_lines`` writes it: one object for one text, for equal layers and
    all graphs that are made of a model name the same texts. Raises ``ParseError``."""
    parser = _Parser(text)
    if not parser.scanner.word("cascade"):
        parser.scanner.fail("expected 'cascade @name'")
    parser.at_name()
    found = parser.cascade()
    if parser.scanner.skip() != len(text):
        parser.scanner.fail("expected the end of the text after the cascade")
    return found


class _Parser:
    def __init__(self, text: str, source: str = "") -> None:
        self.scanner = Scanner(text, source)
        self.expressions = ExpressionParser(self.scanner)

    # graph @name [as @key] phase=word [saved=n] { repeats subgraphs nodes aliases return }
    def graph(self) -> tuple[str, Graph]:
        """A graph and the key it stands under in its parent."""
        scanner = self.scanner
        scanner.descend()
        if not scanner.word("graph"):
            scanner.fail("expected 'graph @name phase=... {'")
        name = self.at_name()
        key = self.at_name() if scanner.word("as") else name
        if not scanner.word("phase"):
            scanner.fail("expected 'phase='")
        scanner.expect("=")
        phase = self.either(_WORD, "a phase")
        saved = 0
        if scanner.word("saved"):
            scanner.expect("=")
            saved = self.count()
        scanner.expect("{", "to open the graph")
        graph = self.body(Graph(name, phase, (), (), saved))
        scanner.ascend()
        return key, graph

    def body(self, graph: Graph) -> Graph:
        scanner = self.scanner
        repeats: list[Repeat] = []
        subgraphs: dict[str, Graph] = {}
        nodes: list[Node] = []
        aliases: list[Alias] = []
        cascades: dict[str, FusedCascade] = {}
        while True:
            if scanner.peek("%"):
                nodes.append(self.node())
            elif scanner.word("alias"):
                aliases.append(self.alias())
            elif scanner.word("return"):
                break
            elif scanner.word("repeat"):
                repeats.append(self.repeat())
            elif scanner.word("cascade"):
                start = scanner.skip()
                key = self.at_name()
                if key in cascades or key in subgraphs:
                    scanner.fail(f"there are two of the name @{key}", start)
                cascades[key] = self.cascade()
            elif scanner.peek("graph"):
                start = scanner.skip()
                key, subgraph = self.graph()
                if key in subgraphs:
                    scanner.fail(f"there are two subgraphs called @{key}", start)
                subgraphs[key] = subgraph
            else:
                scanner.fail("expected '%name = op(...)', 'alias', 'repeat', 'cascade', 'graph' or 'return'")
        scanner.expect("(", "after return")
        outputs = self.arguments(")")
        scanner.expect("}", "to close the graph")
        return replace(
            graph,
            nodes=tuple(nodes),
            outputs=outputs,
            subgraphs=subgraphs,
            aliases=tuple(aliases),
            repeats=tuple(repeats),
            cascades=cascades,
        )

    def cascade(self) -> FusedCascade:
        def types() -> tuple[Type, ...]:
            self.scanner.expect("(", "before the types")
            return self.tuple_type().items

        def word() -> str:
            return self.either(_WORD, "a name")

        return read_fused_cascade(self.scanner, types, self.size, word, self.count)

    def node(self) -> Node:
        scanner = self.scanner
        name = self.value_name()
        value_type = self.type() if scanner.take(":") else None
        scanner.expect("=", "after the value's name and type")
        op = self.either(_OP, "an op")
        scanner.expect("(", "after the op")
        args: list[Argument] = []
        kwargs: list[tuple[str, Argument]] = []
        if not scanner.take(")"):
            while True:
                keyword = self.keyword()
                if keyword is not None:
                    kwargs.append((keyword, self.argument()))
                elif kwargs:
                    scanner.fail("a positional argument comes after a named one")
                else:
                    args.append(self.argument())
                if not scanner.take(","):
                    break
            scanner.expect(")", "or ',' after an argument")
        return self.attributes(Node(name, op, tuple(args), tuple(kwargs), value_type))

    def keyword(self) -> str | None:
        """``name=`` or ``"name"=``, if it comes next."""
        scanner = self.scanner
        start = scanner.skip()
        name = scanner.string() if scanner.peek('"') else scanner.match(_KEYWORD)
        if name is not None and scanner.take("="):
            return name
        scanner.position = start
        return None

    def attributes(self, node: Node) -> Node:
        scanner = self.scanner
        found: dict[str, Any] = {}
        while True:
            start = scanner.skip()
            word = scanner.match(_WORD)
            reader = _ATTRIBUTES.get(word or "")
            if word is None or reader is None or not scanner.take("("):
                scanner.position = start
                return replace(node, **found) if found else node
            field, read = reader
            if field in found:
                scanner.fail(f"'{word}' is given twice", start)
            found[field] = read(self)
            scanner.expect(")", f"to close {word}(")

    def location(self) -> Location:
        scanner = self.scanner
        file, line, source, module = "", 0, "", ""
        if scanner.peek('"'):
            text = scanner.string() or ""
            if scanner.take(":"):
                file, line = text, self.count()
            else:
                source = text
        elif scanner.take(":"):
            line = self.count()
        elif (name := scanner.match(_FILE)) is not None:
            scanner.expect(":")
            file, line = name, self.count()
        if not source:
            source = scanner.string() or ""
        if scanner.word("in"):
            module = self.either(_NAME, "a module path")
        return Location(file, line, source, module)

    def alias(self) -> Alias:
        name = self.value_name()
        if not self.scanner.word("of"):
            self.scanner.fail("expected 'of %base'")
        base = self.value_name()
        return Alias(name, base, self.scanner.word("writes"))

    def repeat(self) -> Repeat:
        name = self.at_name()
        if not self.scanner.word("x"):
            self.scanner.fail("expected 'x' and the number of repeats")
        count = self.count()
        if not self.scanner.word("digest"):
            self.scanner.fail("expected 'digest'")
        return Repeat(name, count, self.quoted("a digest"))

    # Types ------------------------------------------------------------------------------------------------------------

    def type(self) -> Type:
        scanner = self.scanner
        if scanner.take("("):
            return self.tuple_type()
        start = scanner.skip()
        if scanner.peek('"'):
            return self.scalar(scanner.string() or "")
        word = scanner.match(_WORD)
        if word is None:
            scanner.fail("expected a type, such as f32[2,3], int, none, opaque(...) or (f32[2], none)")
        if word == "none":
            return NoneType()
        if word == "opaque" and scanner.take("("):
            name = self.quoted("a class name")
            scanner.expect(")")
            return OpaqueType(name)
        if scanner.take("["):
            if word not in DTYPES:
                scanner.fail(f"there is no dtype '{word}'; known are {', '.join(DTYPES)}", start)
            return self.tensor(word)
        return self.scalar(word)

    def tensor(self, dtype: str) -> TensorType:
        scanner = self.scanner
        shape = self.sizes("]")
        stride = self.sizes("}") if scanner.take("{") else None
        device = self.either(_DEVICE, "a device") if scanner.take("@") else "cpu"
        return TensorType(dtype, shape, device, stride)

    def sizes(self, close: str) -> tuple[Size, ...]:
        scanner = self.scanner
        sizes: list[Size] = []
        if scanner.take(close):
            return ()
        while True:
            quick = scanner.match(_SIMPLE_INT)
            sizes.append(int(quick) if quick is not None else self.size())
            if not scanner.take(","):
                break
        scanner.expect(close, "or ',' after a size")
        return tuple(sizes)

    def size(self) -> Size:
        start = self.scanner.skip()
        value = self.expressions.parse()
        if isinstance(value, int) or (isinstance(value, sympy.Expr) and value is not sympy.nan):
            return value
        self.scanner.fail("a size is an integer or an expression", start)

    def scalar(self, kind: str) -> ScalarType:
        if not self.scanner.take("("):
            return ScalarType(kind)
        value = self.expressions.parse()
        self.scanner.expect(")", f"to close {kind}(")
        return ScalarType(kind, _scalar_value(value))

    def tuple_type(self) -> TupleType:
        scanner = self.scanner
        scanner.descend()
        items: list[Type] = []
        while not scanner.take(")"):
            items.append(self.type())
            if not scanner.take(","):
                scanner.expect(")", "or ',' after a type")
                break
        scanner.ascend()
        return TupleType(tuple(items))

    # Arguments --------------------------------------------------------------------------------------------------------

    def arguments(self, close: str) -> tuple[Argument, ...]:
        """Arguments up to and with ``close``."""
        scanner = self.scanner
        scanner.descend()
        items: list[Argument] = []
        while not scanner.take(close):
            items.append(self.argument())
            if not scanner.take(","):
                scanner.expect(close, "or ',' after an argument")
                break
        scanner.ascend()
        return tuple(items)

    def argument(self) -> Argument:
        scanner = self.scanner
        position = scanner.skip()
        first = scanner.text[position : position + 1]
        if first == "%":
            return Ref(self.value_name())
        if first == "[":
            scanner.position += 1
            return self.arguments("]")
        if first == '"':
            return scanner.string()
        if (quick := scanner.match(_SIMPLE_INT)) is not None:
            return int(quick)
        if first in "tds@l" and (text := scanner.match(_SYMBOL)) is not None:
            return Symbol(text)
        if first in "NTF":
            for word, meant in (("None", None), ("True", True), ("False", False)):
                if scanner.word(word):
                    return meant
        if first == "s" and scanner.word("symbol"):
            return self.quoted_symbol()
        if first == "c" and scanner.word("complex"):
            return self.complex()
        value: Argument = self.expressions.parse()
        return value

    def quoted_symbol(self) -> Symbol:
        self.scanner.expect("(", "after symbol")
        text = self.quoted("the symbol's text")
        self.scanner.expect(")", "to close symbol(")
        return Symbol(text)

    def complex(self) -> complex:
        self.scanner.expect("(", "after complex")
        parts: list[float] = []
        for close in ",)":
            start = self.scanner.skip()
            value = self.expressions.parse()
            if not isinstance(value, float):
                self.scanner.fail("a complex number has two floats", start)
            parts.append(value)
            self.scanner.expect(close)
        return complex(*parts)

    # Small things -----------------------------------------------------------------------------------------------------

    def value_name(self) -> str:
        self.scanner.expect("%", "and a value's name")
        return self.attached(_NAME, "a value's name after '%'")

    def at_name(self) -> str:
        self.scanner.expect("@", "and a graph's name")
        return self.attached(_NAME, "a graph's name after '@'")

    def attached(self, pattern: re.Pattern[str], what: str) -> str:
        """As ``either``, with no blank before it."""
        start = self.scanner.position
        if self.scanner.skip() != start:
            self.scanner.fail(f"expected {what}", start)
        return self.either(pattern, what)

    def either(self, pattern: re.Pattern[str], what: str) -> str:
        """A plain word or a quoted string."""
        text = self.scanner.string() if self.scanner.peek('"') else self.scanner.match(pattern)
        return self.scanner.fail(f"expected {what}") if text is None else text

    def quoted(self, what: str) -> str:
        text = self.scanner.string()
        return self.scanner.fail(f"expected {what} in quotes") if text is None else text

    def count(self) -> int:
        text = self.scanner.match(_COUNT)
        return self.scanner.fail("expected a number") if text is None else int(text)


def _scalar_value(value: Any) -> Any:
    return sympy.Float(value) if isinstance(value, float) else value


#: Attribute in the text -> field of the node, how it is read.
_ATTRIBUTES: dict[str, tuple[str, Any]] = {
    "role": ("role", lambda parser: parser.either(_WORD, "a role")),
    "loc": ("location", _Parser.location),
    "forward": ("forward", _Parser.value_name),
    "from": ("origin", lambda parser: parser.quoted("the rewrite's name")),
    "region": ("region", _Parser.count),
}
