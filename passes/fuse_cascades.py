"""Chosen groups of Einsums become one node each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import networkx

from ..ir.fused_cascade import FusedCascade
from ..ir.graph import CASCADE_OP, Graph, Node, Ref, Symbol
from ..ir.types import TensorType, TupleType
from ..logs import logger
from .effects import Storages, has_effect, written_names
from .raising.choose import Choice, choose
from .raising.group import Group, Rest
from .raising.raise_graph import raise_graph
from .rewriting import rebuild, with_subgraphs

_log = logger("cascades")


@dataclass(frozen=True)
class FuseCascades:
    """Replace every group that ``passes.raising`` chooses by one ``effcc.cascade`` node, whose cascade stands in the
    graph's table; equal groups share one. Values keep their names: a result is a ``getitem`` of the node. Ops that
    nothing needs any more are gone. ``saved_bytes`` and ``gain`` as in ``Choice``.

    rewrite::

        %bmm: f32[8,12,12] = aten.bmm.default(%q, %kt)
        ...
        %p: f32[8,12,12] = aten.div.Tensor(%exp, %sum)
        %o: f32[8,12,8] = aten.bmm.default(%p, %v)

        -> cascade @fused_o (f32[2,4,12,8], ...) -> (f32[8,12,8],) { ... }
           %fused_o: (f32[8,12,8],) = effcc.cascade.default(@fused_o, %q, %k, %v)
           %o: f32[8,12,8] = getitem(%fused_o, 0)
    """

    name: ClassVar[str] = "fuse-cascades"
    saved_bytes: int = Choice.saved_bytes
    gain: float = Choice.gain

    def apply(self, graph: Graph) -> Graph:
        graph = with_subgraphs(graph, self.apply)
        chosen = choose(raise_graph(graph), Choice(saved_bytes=self.saved_bytes, gain=self.gain))
        for group in chosen.groups:
            _log.info("%s of %s becomes one kernel", group.name, graph.name)
        for refused in chosen.refused:
            _log.info("%s of %s stays: %s", refused.tensor, graph.name, refused.why)
        return fuse(graph, chosen.groups) if chosen.groups else graph


def fuse(graph: Graph, groups: Sequence[Group]) -> Graph:
    """The graph with the groups as nodes. All groups of a component must be given together, as ``choose`` does."""
    taken = {node.name for node in graph.nodes} | set(graph.subgraphs) | set(graph.cascades)
    cascades = dict(graph.cascades)
    table = {_key(fused): name for name, fused in cascades.items()}
    replaced: dict[str, Node] = {}
    added: list[tuple[int, Node]] = []
    position = {node.name: number for number, node in enumerate(graph.nodes)}
    nodes = graph.by_name()
    for group in groups:
        key = _key(group.fused)
        if key not in table:
            table[key] = _fresh(group.name, set(cascades) | set(graph.subgraphs))
            cascades[table[key]] = group.fused
        call = _fresh(group.name, taken)
        place = min(position[name] for name in group.nodes)
        arguments = (Symbol(f"@{table[key]}"), *(Ref(name) for name in group.operands))
        origin = f"fused from {', '.join('%' + name for name in group.nodes)}"
        kind = TupleType(group.fused.results)
        added.append((place, Node(call, CASCADE_OP, arguments, type=kind, location=group.location, origin=origin)))
        for number, name in enumerate(group.results):
            part = Node(name, "getitem", (Ref(call), number), type=group.fused.results[number], location=group.location)
            if name in nodes:
                replaced[name] = replace(part, location=nodes[name].location, forward=nodes[name].forward)
            else:
                added.append((place, part))
                taken.add(name)
        for rest in group.rests:
            added += [(place, node) for node in _rest(rest, group, nodes[rest.value], taken, replaced)]
    kept = [(position[node.name], replaced.get(node.name, node)) for node in graph.nodes]
    ordered = _ordered(_living(kept + added, graph), graph)
    aliases = tuple(alias for alias in graph.aliases if alias.name not in replaced)
    return rebuild(replace(graph, aliases=aliases, cascades=cascades), ordered)


def _key(fused: FusedCascade) -> Any:
    return (
        fused.cascade, tuple(fused.sizes.items()), fused.operands, fused.results, fused.inputs, fused.outputs,
        tuple(fused.dtypes.items()), fused.wide,
    )  # fmt: skip


def _fresh(name: str, taken: set[str]) -> str:
    made, count = name, 1
    while made in taken:
        count += 1
        made = f"{name}_{count}"
    taken.add(made)
    return made


def _rest(rest: Rest, group: Group, original: Node, taken: set[str], replaced: dict[str, Node]) -> list[Node]:
    """The sum of a partial result as ops; the last one, which keeps the value's name, goes into ``replaced``."""
    part = group.fused.results[group.results.index(rest.result)]
    wanted = original.type
    assert isinstance(wanted, TensorType)
    steps: list[tuple[str, tuple[Any, ...], TensorType]] = []
    shape = part.shape[rest.count :]
    current = TensorType(part.dtype, shape, part.device)
    steps.append(("aten.sum.dim_IntList", (list(range(rest.count)),), current))
    if current.dtype != wanted.dtype:
        current = TensorType(wanted.dtype, shape, part.device)
        steps.append(("prims.convert_element_type.default", (Symbol(f"torch.{_torch_name(wanted.dtype)}"),), current))
    if current.shape != wanted.shape:
        current = TensorType(wanted.dtype, wanted.shape, part.device)
        steps.append(("aten.reshape.default", (tuple(wanted.shape),), current))
    nodes: list[Node] = []
    source = rest.result
    for number, (op, arguments, kind) in enumerate(steps):
        last = number == len(steps) - 1
        name = original.name if last else _fresh(f"{rest.result}_sum", taken)
        plain = tuple(tuple(item) if isinstance(item, list) else item for item in arguments)
        node = Node(name, op, (Ref(source), *plain), type=kind, location=original.location, forward=original.forward)
        if last:
            replaced[original.name] = node
        else:
            nodes.append(node)
        source = name
    return nodes


def _torch_name(dtype: str) -> str:
    from ..ir.types import DTYPES

    return DTYPES[dtype][0]


def _living(items: list[tuple[int, Node]], graph: Graph) -> list[tuple[int, Node]]:
    """What the outputs and ops with an effect need; inputs stay."""
    by_name = {node.name: node for _, node in items}
    waiting = [*graph.output_names()]
    waiting += [node.name for _, node in items if node.op == "input" or has_effect(node, graph)]
    living: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in living:
            living.add(name)
            waiting += by_name[name].operands()
    return [(place, node) for place, node in items if node.name in living]


def _ordered(items: list[tuple[int, Node]], graph: Graph) -> list[Node]:
    """An order in which values come before their uses, writes stay behind the reads that they were behind, and that is
    otherwise the given one."""
    order = networkx.DiGraph()
    number = {node.name: at for at, (_, node) in enumerate(items)}
    order.add_nodes_from(range(len(items)))
    for at, (_, node) in enumerate(items):
        order.add_edges_from((number[name], at) for name in node.operands())
    storages = Storages(graph)
    for writer, (place, node) in enumerate(items):
        roots = {storages.root(name) for name in written_names(node, graph)}
        if not roots:
            continue
        for reader, (other, each) in enumerate(items):
            if reader != writer and any(storages.root(name) in roots for name in each.operands()):
                order.add_edge(*((reader, writer) if other < place else (writer, reader)))
    first = {at: (0 if node.op == "input" else 1, place, at) for at, (place, node) in enumerate(items)}
    return [items[at][1] for at in networkx.lexicographical_topological_sort(order, key=first.__getitem__)]
