"""What ``effcc passes`` tells of a model's graph: its cascade, the groups that become kernels, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...ir.graph import Graph
from .choose import Choice, Refused, choose
from .group import Group
from .raise_graph import Raised, raise_graph


@dataclass(frozen=True)
class GraphAnalysis:
    """One graph (or subgraph, ``name`` as ``graph.subgraph``). ``kept``: graph value -> why its op was not raised."""

    name: str
    raised: Raised
    groups: tuple[Group, ...]
    refused: tuple[Refused, ...]

    @property
    def kept(self) -> dict[str, str]:
        return dict(self.raised.kept)


def raise_and_analyse(graph: Graph, choice: Choice | None = None) -> list[GraphAnalysis]:
    """Raise a graph and its subgraphs, and choose what is fused in each.

    Each group has ``fused.cascade`` (as written) and ``rewriting`` (rewritten cascade, certificates, refusals), which
    the cascade table prints as for a cascade given as text.
    """
    return list(_analyse(graph, graph.name, choice))


def analyse(graph: Graph, name: str, choice: Choice | None = None) -> GraphAnalysis:
    """One graph without its subgraphs."""
    raised = raise_graph(graph)
    chosen = choose(raised, choice)
    return GraphAnalysis(name, raised, chosen.groups, chosen.refused)


def _analyse(graph: Graph, name: str, choice: Choice | None) -> Iterator[GraphAnalysis]:
    yield analyse(graph, name, choice)
    for key, body in graph.subgraphs.items():
        yield from _analyse(body, f"{name}.{key}", choice)
