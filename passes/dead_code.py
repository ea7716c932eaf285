"""Dead code elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from ..ir.graph import Graph
from .effects import has_effect, size_symbols
from .rewriting import rebuild, with_subgraphs


@dataclass(frozen=True)
class DeadCode:
    """Remove ops whose result nobody reads.

    Kept although unread: inputs, writes to memory, random draws (removing one would shift the generator for those after
    it), assertions, ops that are not known to be pure, and ops that bring a new size symbol into being.

    rewrite::

        %a: f32[4] = aten.exp.default(%x)          ->
        %b: f32[4] = aten.neg.default(%x)          %b: f32[4] = aten.neg.default(%x)
        return %b                                  return %b
    """

    name: ClassVar[str] = "dead-code"

    def apply(self, graph: Graph) -> Graph:
        graph = with_subgraphs(graph, self.apply)
        makers = _symbol_makers(graph)
        alive = set(graph.output_names())
        kept = []
        for node in reversed(graph.nodes):
            if node.name in alive or node.name in makers or has_effect(node, graph):
                alive.update(node.operands())
                kept.append(node)
        return graph if len(kept) == len(graph.nodes) else rebuild(graph, reversed(kept))


def _symbol_makers(graph: Graph) -> set[str]:
    """Nodes in whose type a size symbol appears for the first time (``nonzero``, ``item``)."""
    known: set[sympy.Symbol] = set()
    makers = set()
    for node in graph.nodes:
        symbols = size_symbols(node.type)
        if node.op != "input" and symbols - known:
            makers.add(node.name)
        known.update(symbols)
    return makers
