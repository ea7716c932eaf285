"""The check that runs before and after every pass.

``verify`` reports the first problem of the first of the ``rules`` that finds one, with the ten lines around it.
"""

from __future__ import annotations

from ..errors import VerificationError
from .expressions import ExpressionError
from .graph import Argument, Graph
from .printer import print_argument, print_node
from .rules import RULES

#: Lines shown around the bad one.
CONTEXT = 10


def verify(graph: Graph) -> None:
    """Raise ``VerificationError`` at the first broken rule, in subgraphs too."""
    for name, subgraph in graph.subgraphs.items():
        if not isinstance(subgraph, Graph):
            raise VerificationError(f"subgraph @{name} of graph @{graph.name} is not a Graph")
        verify(subgraph)
    for rule in RULES:
        for problem in rule(graph):
            raise VerificationError(
                f"graph @{graph.name}: {problem.message}\n{excerpt(graph, problem.index)}",
                where=_where(graph, problem.index),
                remedy=problem.remedy,
            )


def excerpt(graph: Graph, index: int | None) -> str:
    """The lines around node ``index``, the bad one marked; the graph's ends if there is no such node."""
    count = len(graph.nodes)
    middle = count if index is None else index
    first = max(0, min(middle - CONTEXT // 2, count - CONTEXT))
    lines = []
    for position in range(first, min(count, first + CONTEXT + 1)):
        try:
            text = print_node(graph.nodes[position])
        except (ExpressionError, TypeError, AttributeError) as error:
            text = f"(cannot be printed: {error})"
        lines.append(f"{'>' if position == index else ' '} {position:5d}  {text}")
    if index is None:
        lines.append(f">        return ({', '.join(map(_shown, graph.outputs))})")
    return "\n".join(lines)


def _shown(argument: Argument) -> str:
    try:
        return print_argument(argument)
    except (ExpressionError, TypeError):
        return f"(cannot be printed: {argument!r})"


def _where(graph: Graph, index: int | None) -> str:
    if index is None:
        return ""
    location = graph.nodes[index].location
    place = f"{location.file}:{location.line}" if location.file else ""
    return " in ".join(part for part in (place, location.module) if part)
