"""Text form of the graph, one op a line. ``docs/ir.md`` describes the language; ``parser`` reads it back exactly."""

from __future__ import annotations

import re
from collections.abc import Iterator

import sympy

from .expressions import print_expression, print_float
from .fused_cascade_text import fused_cascade_lines
from .graph import Alias, Argument, Graph, Location, Node, Ref, Repeat, Symbol
from .text import quote
from .type_text import PLAIN_WORD, plain, print_type

PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+\Z")
PLAIN_OP = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")
PLAIN_FILE = re.compile(r"(?!in\Z)[A-Za-z0-9_./+-]+\Z")
#: Symbols printed bare. All others are ``symbol("...")``.
PLAIN_SYMBOL = re.compile(
    r"(torch(\.[A-Za-z_][A-Za-z0-9_]*)+|device\([a-z]+(:[0-9]+)?\)|@[A-Za-z0-9_.]+|dict|slice|list)\Z"
)


def print_graph(graph: Graph) -> str:
    """The graph as text; ``parse_graph`` gives an equal graph back. Raises ``ExpressionError`` for a size expression
    outside of the IR's vocabulary."""
    return "\n".join(_graph_lines(graph, "", None)) + "\n"


def _graph_lines(graph: Graph, indent: str, key: str | None) -> Iterator[str]:
    header = f"{indent}graph {_at(graph.name)}"
    if key is not None and key != graph.name:
        header += f" as {_at(key)}"
    header += f" phase={plain(graph.phase, PLAIN_WORD)}"
    if graph.saved:
        header += f" saved={graph.saved}"
    yield header + " {"
    inner = indent + "  "
    for repeat in graph.repeats:
        yield inner + print_repeat(repeat)
    for name, subgraph in graph.subgraphs.items():
        yield from _graph_lines(subgraph, inner, name)
    for name, fused in graph.cascades.items():
        yield from (inner + line for line in fused_cascade_lines(_at(name), fused))
    for node in graph.nodes:
        yield inner + print_node(node)
    for alias in graph.aliases:
        yield inner + print_alias(alias)
    yield f"{inner}return ({', '.join(map(print_argument, graph.outputs))})"
    yield indent + "}"


def print_node(node: Node) -> str:
    """One line, without indent: ``%name: type = op(arguments)  attributes``."""
    arguments = [print_argument(argument) for argument in node.args]
    arguments += [f"{plain(name, PLAIN_WORD)}={print_argument(value)}" for name, value in node.kwargs]
    type_text = "" if node.type is None else f": {print_type(node.type)}"
    parts = [f"{print_name(node.name)}{type_text} = {plain(node.op, PLAIN_OP)}({', '.join(arguments)})"]
    if node.role:
        parts.append(f"role({plain(node.role, PLAIN_WORD)})")
    if node.location != Location():
        parts.append(print_location(node.location))
    if node.forward:
        parts.append(f"forward({print_name(node.forward)})")
    if node.origin:
        parts.append(f"from({quote(node.origin)})")
    if node.region is not None:
        parts.append(f"region({node.region})")
    return "  ".join(parts)


def print_location(location: Location) -> str:
    """``loc(model.py:88 "h = self.up(x)" in layers.3.mlp)``; unknown parts are left out."""
    parts = []
    if location.file or location.line:
        file = plain(location.file, PLAIN_FILE) if location.file else ""
        parts.append(f"{file}:{location.line}")
    if location.source:
        parts.append(quote(location.source))
    if location.module:
        parts.append(f"in {plain(location.module, PLAIN_NAME)}")
    return f"loc({' '.join(parts)})"


def print_alias(alias: Alias) -> str:
    writes = " writes" if alias.writes else ""
    return f"alias {print_name(alias.name)} of {print_name(alias.base)}{writes}"


def print_repeat(repeat: Repeat) -> str:
    return f"repeat {_at(repeat.name)} x {repeat.count} digest {quote(repeat.digest)}"


def print_name(name: str) -> str:
    return "%" + plain(name, PLAIN_NAME)


def print_argument(argument: Argument) -> str:
    """``%x``, ``3``, ``-0.0``, ``"text"``, ``[1, 2]``, ``torch.float32``, ``2*s0 + 1``."""
    if isinstance(argument, Ref):
        return print_name(argument.name)
    if isinstance(argument, tuple):
        return f"[{', '.join(map(print_argument, argument))}]"
    if argument is None or isinstance(argument, bool):
        return str(argument)
    if isinstance(argument, str):
        return quote(argument)
    if isinstance(argument, Symbol):
        return argument.text if PLAIN_SYMBOL.match(argument.text) else f"symbol({quote(argument.text)})"
    if isinstance(argument, complex):
        return f"complex({print_float(argument.real)}, {print_float(argument.imag)})"
    if isinstance(argument, int | float | sympy.Basic):
        return print_expression(argument)
    raise TypeError(f"an argument of class {type(argument).__name__} has no text form: {argument!r}")


def _at(name: str) -> str:
    return "@" + plain(name, PLAIN_NAME)
