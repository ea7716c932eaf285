"""Passes on text: a graph's lines in, its lines out."""

from __future__ import annotations

import textwrap

from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.ir.verifier import verify
from effcc.passes.pipeline import Pass

HEADER = "graph @g phase=inference {"


def graph_of(lines: str) -> Graph:
    """The verified graph of these lines (nodes, aliases, return, without the header)."""
    graph = parse_graph(f"{HEADER}\n{lines}\n}}")
    verify(graph)
    return graph


def lines_of(graph: Graph) -> str:
    """The lines of a graph without its header, unindented."""
    verify(graph)
    text = print_graph(graph)
    assert parse_graph(text) == graph
    return textwrap.dedent(text.removeprefix(f"{HEADER}\n").removesuffix("}\n")).strip()


def rewritten(pass_: Pass, lines: str) -> str:
    """The lines after the pass, which leaves its own result alone."""
    after = pass_.apply(graph_of(lines))
    assert pass_.apply(after) == after, "a second run changes nothing"
    return lines_of(after)


def plain(lines: str) -> str:
    """Expected lines as they are printed: without the indent of the test's source."""
    return textwrap.dedent(lines).strip()
