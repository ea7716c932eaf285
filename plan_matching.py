"""A plan made elsewhere, matched to the graph that Dynamo has just captured.

Matched is structure: ops, plain arguments, dtypes, shapes, data flow, aliasing (``ir.structural_hash``). Names, source
lines and devices do not count, so a plan made on a machine without a GPU fits the same model on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .errors import PlanError
from .frontend.fx_import import from_fx
from .ir.graph import Graph, Node
from .ir.plan import GraphPlan, Plan
from .ir.plan_file import load_plan
from .ir.structural_hash import graph_hash, op_hashes
from .ir.type_text import print_type
from .options import Options

__all__ = ["check_plan", "decided_by", "matching_plan"]


def matching_plan(path: str, gm: torch.fx.GraphModule, roles: Sequence[str]) -> Plan:
    """The plan in ``path``, once one of its graphs is found equal in structure to ``gm``, on whatever device.

    Raises PlanError when the file is damaged, or made for another graph (naming the first op that differs).
    """
    plan = load_plan(path).plan
    check_plan(plan, from_fx(gm, "captured", "joint", roles=roles), path)
    return plan


def decided_by(plan: Plan | None, options: Options) -> Options:
    """The options with what the plan was made under, where they do not say otherwise: its budget, and swapping."""
    if plan is None or plan.budget is None or options.memory_budget is not None:
        return options
    swaps = any(step.kind == "swap_out" for step in plan.steps)
    return replace(options, memory_budget=plan.budget, swap=options.swap or swaps)


def check_plan(plan: Plan, captured: Graph, path: str = "") -> GraphPlan:
    """The graph of the plan that is equal in structure to ``captured``. Raises PlanError if there is none."""
    if not plan.graphs:
        raise PlanError(f"the plan of {plan.model} holds no graph", where=path, remedy="Make the plan again.")
    digest = graph_hash(captured)
    for graph in plan.graphs:
        if graph.graph_hash == digest:
            return graph
    own = op_hashes(captured)
    likest = max(plan.graphs, key=lambda graph: _common_prefix(graph.op_hashes, own))
    raise PlanError(
        f"the plan of {plan.model} was made for another graph than the one captured: "
        f"{_difference(likest, captured, own)}",
        where=path,
        remedy="Make the plan again with `effcc plan` from this model: the same inputs, training or inference, and the "
        "loss inside the compiled function where the model file has a `loss`, outside where it has none.",
    )


def _common_prefix(planned: Sequence[str], own: Sequence[str]) -> int:
    for index, (theirs, mine) in enumerate(zip(planned, own, strict=False)):
        if theirs != mine:
            return index
    return min(len(planned), len(own))


def _difference(graph: GraphPlan, captured: Graph, own: Sequence[str]) -> str:
    equal = _common_prefix(graph.op_hashes, own)
    if equal < min(len(own), len(graph.op_hashes)):
        return f"{_describe(captured.nodes[equal])} differs from graph {graph.name!r}"
    if equal < len(own):
        return f"{_describe(captured.nodes[equal])} comes after the last op of graph {graph.name!r}"
    if equal < len(graph.op_hashes):
        last = f" after {_describe(captured.nodes[-1])}" if captured.nodes else ""
        more = len(graph.op_hashes) - equal
        return f"graph {graph.name!r} has {more} more op{'s' if more > 1 else ''}{last}"
    return f"graph {graph.name!r} has the same ops, but other outputs or other views"


def _describe(node: Node) -> str:
    place = f" at {node.location.file}:{node.location.line}" if node.location.file else ""
    what = "input" if node.op == "input" else "op"
    kind = "" if node.type is None else f": {print_type(node.type)}"
    return f"{what} %{node.name}{kind} = {node.op}{place}" if what == "op" else f"{what} %{node.name}{kind}{place}"
