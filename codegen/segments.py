"""Cut an FX graph into segments that are compiled apart: runs of ops, and calls of repeated layers.

Order is kept: a segment is a run of nodes that stand next to each other, so mutation and randomness happen in the order
in which the graph has them. Equal layers are calls of one subgraph and share its compiled code.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from ..torch_internals import is_invoke_subgraph
from .known_faults import known_fault

REGION, CALL, EAGER = "region", "call", "eager"


@dataclass(frozen=True)
class Constant:
    """An argument that is not computed: a number or None written in the graph."""

    value: Any


@dataclass
class Segment:
    """A piece of a graph. ``module`` computes ``outputs`` from ``inputs`` (nodes of the whole graph)."""

    index: int
    kind: str
    module: fx.GraphModule
    inputs: list[fx.Node | Constant]
    outputs: list[fx.Node | None]
    #: Segments with equal ``identity`` run the same compiled code.
    identity: str
    #: Indices of outputs whose strides must be those of the graph, because another segment or the user sees them.
    fixed_strides: list[int] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    #: Names of the module's ops, inputs and results, as they were before it was compiled.
    names: list[str] = field(default_factory=list)
    input_names: list[str] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.input_names = [node.name for node in self.module.graph.find_nodes(op="placeholder")]

    def fake_inputs(self) -> list[Any]:
        return [node.meta["val"] for node in self.module.graph.nodes if node.op == "placeholder"]


def cut(gm: fx.GraphModule, eager_ops: Collection[str] = ()) -> list[Segment]:
    """Segments of ``gm`` in order. Nodes whose target's name is in ``eager_ops``, or that Inductor is known to compute
    wrongly, form segments of their own."""
    runs: list[tuple[str, list[fx.Node]]] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if node.op == "call_function" and node.target is operator.getitem and is_call_part(node):
            continue
        alone = str(node.target) in eager_ops or known_fault(node) is not None
        kind = CALL if is_invoke_subgraph(node) else EAGER if alone else REGION
        if kind == REGION and runs and runs[-1][0] == REGION:
            runs[-1][1].append(node)
        else:
            runs.append((kind, [node]))
    symbols = symbol_holders(gm)
    results = output_nodes(gm)
    visible = visible_outputs(gm)
    owner = {node: index for index, (_, nodes) in enumerate(runs) for node in nodes}
    segments: list[Segment] = []
    bodies: dict[str, Segment] = {}
    for index, (kind, nodes) in enumerate(runs):
        if kind == CALL:
            segments.append(call_segment(gm, index, nodes[0], bodies))
        else:
            segments.append(run_segment(gm, index, kind, nodes, owner, symbols, results, visible))
    return segments


def is_call_part(node: fx.Node) -> bool:
    """Whether ``node`` is a ``getitem`` of a repeated layer's call."""
    source = node.args[0]
    return isinstance(source, fx.Node) and is_invoke_subgraph(source)


def output_nodes(gm: fx.GraphModule) -> list[Any]:
    (output,) = gm.graph.find_nodes(op="output")
    return list(output.args[0])


def visible_outputs(gm: fx.GraphModule) -> set[fx.Node]:
    """Outputs that the user gets, and whose strides therefore may not change."""
    (output,) = gm.graph.find_nodes(op="output")
    results = output.args[0]
    return {results[index] for index in output.meta.get("user_visible_output_idxs", ())}


def symbol_holders(gm: fx.GraphModule) -> dict[Any, fx.Node]:
    """Shape symbol -> the input that carries its value."""
    holders: dict[Any, fx.Node] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and node.op == "placeholder":
            expression = value.node.expr
            if expression.is_Symbol:
                holders.setdefault(expression, node)
    return holders


def free_symbols(value: Any) -> Iterable[Any]:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        yield from value.node.expr.free_symbols
    elif isinstance(value, torch.Tensor):
        for size in (*value.shape, *value.stride(), value.storage_offset()):
            if isinstance(size, torch.SymInt):
                yield from size.node.expr.free_symbols
    elif isinstance(value, list | tuple):
        for item in value:
            yield from free_symbols(item)


def call_segment(gm: fx.GraphModule, index: int, node: fx.Node, bodies: dict[str, Segment]) -> Segment:
    """A call of a repeated layer: its subgraph is the module; parts nobody reads stay None. ``bodies`` holds the first
    call of each layer, whose copy of the subgraph the others share."""
    subgraph, identifier, *operands = node.args
    assert isinstance(subgraph, fx.Node) and isinstance(subgraph.target, str)
    module = getattr(gm, subgraph.target)
    first = bodies.get(f"call:{identifier}")
    width = len(output_nodes(module)) if first is None else len(first.outputs)
    outputs: list[fx.Node | None] = [None] * width
    for user in node.users:
        assert user.target is operator.getitem and isinstance(user.args[1], int)
        outputs[user.args[1]] = user
    inputs = [operand if isinstance(operand, fx.Node) else Constant(operand) for operand in operands]
    if first is not None:
        return replace(first, index=index, inputs=inputs, outputs=outputs)
    for placeholder, operand in zip(module.graph.find_nodes(op="placeholder"), operands, strict=True):
        if "val" not in placeholder.meta and isinstance(operand, fx.Node):
            placeholder.meta["val"] = operand.meta["val"]
    made = bodies[f"call:{identifier}"] = Segment(
        index=index,
        kind=CALL,
        module=copy_module(module),
        inputs=inputs,
        outputs=outputs,
        identity=f"call:{identifier}",
        fixed_strides=list(range(width)),
        ops=[str(item.target) for item in module.graph.nodes if item.op == "call_function"],
        names=[item.name for item in module.graph.nodes if item.op == "call_function"],
        output_names=[item.name if isinstance(item, fx.Node) else "" for item in output_nodes(module)],
    )
    return made


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph in a new module: what compiles a segment rewrites its graph in place."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    (old,) = module.graph.find_nodes(op="output")
    (new,) = graph.find_nodes(op="output")
    new.meta = dict(old.meta)
    new.meta["user_visible_output_idxs"] = list(range(len(old.args[0])))
    return fx.GraphModule(module, graph)


def run_segment(
    gm: fx.GraphModule,
    index: int,
    kind: str,
    nodes: Sequence[fx.Node],
    owner: dict[fx.Node, int],
    symbols: dict[Any, fx.Node],
    results: Sequence[Any],
    visible: set[fx.Node],
) -> Segment:
    """A run of ops as a module of its own, with node metadata (source lines, fake values) kept."""
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    needed: set[Any] = set()
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in inside and operand.op != "get_attr":
                inputs.setdefault(operand)
            needed.update(free_symbols(operand.meta.get("val")))
        needed.update(free_symbols(node.meta.get("val")))
    for symbol in sorted(needed & symbols.keys(), key=str):
        inputs.setdefault(symbols[symbol])
    result_set = {result for result in results if isinstance(result, fx.Node)}
    outputs: list[fx.Node | None] = []
    fixed: list[int] = []
    for node in nodes:
        crosses = any(owner.get(user, index) != index for user in node.users)
        if crosses or node in result_set:
            if crosses or node in visible:
                fixed.append(len(outputs))
            outputs.append(node)

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and operand not in copies:
                copies[operand] = graph.node_copy(operand)
        copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    output = graph.output(tuple(copies[node] for node in outputs if node is not None))
    output.meta["user_visible_output_idxs"] = list(fixed)
    return Segment(
        index=index,
        kind=kind,
        module=fx.GraphModule(gm, graph),
        inputs=list(inputs),
        outputs=outputs,
        identity=f"{kind}:{index}",
        fixed_strides=fixed,
        ops=[str(node.target) for node in nodes],
        names=[node.name for node in nodes],
        output_names=[node.name for node in outputs if node is not None],
    )
