"""Regions: the stretches of a graph that are compiled together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..cost_model.op_classes import DATA_DEPENDENT, kind_of, packet
from ..ir.graph import Alias, Graph, Node, Ref, references
from .rewriting import with_subgraphs


@dataclass(frozen=True)
class Regions:
    """Number the regions: maximal runs of ops between calls and steps that run alone.

    A call of a subgraph is no region; its subgraph has regions of its own. Ops of other libraries, and our own
    (``effcc.cascade``), are called from the code of the region around them. Alone are higher-order ops, collectives,
    ops whose result has a size that depends on data, and the ops named in ``alone`` (``aten.mm``, or a full overload
    name). Inputs, constants and parts of a call's result belong to no region.

    rewrite::

        %a: f32[4] = aten.exp.default(%x)              ->  %a: ... region 0
        %b: f32[4] = call(@layer, %a)                      %b: ...
        %c: f32[4] = aten.neg.default(%b)                  %c: ... region 1
    """

    name: ClassVar[str] = "regions"
    alone: tuple[str, ...] = ()

    def apply(self, graph: Graph) -> Graph:
        graph = with_subgraphs(graph, self.apply)
        nodes: list[Node] = []
        region_of: dict[str, int | None] = {}
        count, open_ = 0, False
        for node in graph.nodes:
            region: int | None = None
            if node.op == "call":
                open_ = False
            elif node.op == "getitem":
                source = node.args[0]
                region = region_of.get(source.name) if isinstance(source, Ref) else None
            elif node.op not in ("input", "constant"):
                alone = self.runs_alone(node)
                if alone or not open_:
                    count += 1
                region, open_ = count - 1, not alone
            region_of[node.name] = region
            nodes.append(node if node.region == region else replace(node, region=region))
        changed = any(new is not old for new, old in zip(nodes, graph.nodes, strict=True))
        return graph.with_nodes(tuple(nodes)) if changed else graph

    def runs_alone(self, node: Node) -> bool:
        base = packet(node.op)
        higher_order = kind_of(node.op) == "opaque" and "." not in node.op
        return (
            higher_order
            or kind_of(node.op) == "collective"
            or base in DATA_DEPENDENT
            or bool({base, node.op} & set(self.alone))
        )


def region_graph(graph: Graph, nodes: Sequence[Node], name: str) -> Graph:
    """The given nodes of ``graph`` as a graph of their own: inputs are the values they read from elsewhere (keeping the
    roles of graph inputs), outputs the values that are used elsewhere or returned, both in order of first use."""
    inside = {node.name for node in nodes}
    by_name = graph.by_name()
    outer = dict.fromkeys(value for node in nodes for value in node.operands() if value not in inside)
    inputs = tuple(
        replace(by_name[value], op="input", args=(), kwargs=(), region=None, role=by_name[value].role or "input")
        for value in outer
    )
    used = {value for node in graph.nodes if node.name not in inside for value in node.operands()}
    used.update(value for output in graph.outputs for value in references(output))
    outputs = tuple(Ref(node.name) for node in nodes if node.name in used)
    known = inside | set(outer)
    aliases = tuple(
        Alias(alias.name, alias.base, alias.writes)
        for alias in graph.aliases
        if alias.name in known and alias.base in known
    )
    return Graph(
        name=name,
        phase=graph.phase,
        nodes=(*inputs, *nodes),
        outputs=outputs,
        subgraphs=graph.subgraphs,
        aliases=aliases,
        cascades=graph.cascades,
    )
