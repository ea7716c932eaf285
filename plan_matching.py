"""A plan made elsewhere, matched to the graph that Dynamo has just captured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import PlanError
from .frontend.fx_import import from_fx
from .ir.graph import Graph
from .ir.plan import GraphPlan, Plan
from .ir.plan_file import load_plan
from .ir.structural_hash import first_difference, graph_hash


def matching_plan(path: str, gm: torch.fx.GraphModule, roles: Sequence[str]) -> Plan:
    """The plan in ``path``, once one of its graphs is found equal in structure to ``gm``, on whatever device.

    Raises PlanError when the file is damaged, or made for another graph (naming the first op that differs).
    """
    plan = load_plan(path).plan
    captured = from_fx(gm, "captured", "joint", roles=roles)
    digest = graph_hash(captured)
    if any(graph.graph_hash == digest for graph in plan.graphs):
        return plan
    if not plan.graphs:
        raise PlanError(f"the plan of {plan.model} holds no graph", where=path, remedy="Make the plan again.")
    likest = max(plan.graphs, key=lambda graph: common_prefix(graph, captured))
    raise PlanError(
        f"the plan was made for another graph than the one captured: {difference(likest, captured)}",
        where=path,
        remedy="Make the plan again from this model with `effcc plan`, with the same inputs and the same mode "
        "(training or inference).",
    )


def common_prefix(graph: GraphPlan, captured: Graph) -> int:
    node = first_difference(graph.op_hashes, captured)
    return len(captured.nodes) if node is None else captured.nodes.index(node)


def difference(graph: GraphPlan, captured: Graph) -> str:
    node = first_difference(graph.op_hashes, captured)
    if node is None:
        return f"graph {graph.name!r} has other outputs, or more ops"
    place = f" at {node.location.file}:{node.location.line}" if node.location.file else ""
    return f"op %{node.name} = {node.op}{place} differs from graph {graph.name!r}"
