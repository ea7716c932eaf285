"""What every rewrite needs: walk subgraphs, rename uses, and keep the graph's facts true afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ..ir.graph import Alias, Argument, Graph, Node, Ref, Repeat, substitute
from ..ir.structural_hash import graph_hash
from .effects import subgraph_symbols


def with_subgraphs(graph: Graph, rewrite: Callable[[Graph], Graph]) -> Graph:
    """The graph with ``rewrite`` applied to each of its subgraphs, and the digests of its repeats renewed."""
    subgraphs = {name: rewrite(body) for name, body in graph.subgraphs.items()}
    changed = {name for name, body in subgraphs.items() if body is not graph.subgraphs[name]}
    if not changed:
        return graph
    repeats = tuple(
        replace(fact, digest=graph_hash(subgraphs[fact.name])) if fact.name in changed else fact
        for fact in graph.repeats
    )
    return replace(graph, subgraphs=subgraphs, repeats=repeats)


def rename_node(node: Node, values: Mapping[str, Argument]) -> Node:
    """The node with its reads replaced by ``values`` (missing names stay)."""
    if not any(name in values for name in node.operands()):
        return node

    def rename(name: str) -> Argument:
        return values.get(name, Ref(name))

    kwargs = tuple((key, substitute(value, rename)) for key, value in node.kwargs)
    return replace(node, args=tuple(substitute(argument, rename) for argument in node.args), kwargs=kwargs)


def rebuild(graph: Graph, nodes: Iterable[Node], values: Mapping[str, Argument] | None = None) -> Graph:
    """The graph with new ``nodes``; outputs, alias facts, subgraphs and repeats follow.

    ``values`` says what stands for each removed value that is still named elsewhere.
    """
    values = values or {}
    kept = tuple(nodes)

    def rename(name: str) -> Argument:
        return values.get(name, Ref(name))

    outputs = tuple(substitute(output, rename) for output in graph.outputs)
    called = {symbol.removeprefix("@") for node in kept for symbol in subgraph_symbols(node)}
    subgraphs = {name: body for name, body in graph.subgraphs.items() if name in called}
    return replace(
        graph,
        nodes=kept,
        outputs=outputs,
        aliases=_aliases(graph.aliases, {node.name for node in kept}, values),
        subgraphs=subgraphs if len(subgraphs) != len(graph.subgraphs) else graph.subgraphs,
        cascades={name: fused for name, fused in graph.cascades.items() if name in called},
        repeats=_repeats(graph.repeats, kept),
    )


def _aliases(aliases: tuple[Alias, ...], alive: set[str], values: Mapping[str, Argument]) -> tuple[Alias, ...]:
    """Facts about values that are left; a base that is gone gives way to its stand-in or its own base."""
    base_of = {alias.name: alias.base for alias in aliases}

    def living(name: str) -> str | None:
        seen: set[str] = set()
        while name not in alive:
            if name in seen:
                return None
            seen.add(name)
            stand_in = values.get(name)
            following = stand_in.name if isinstance(stand_in, Ref) else base_of.get(name)
            if following is None:
                return None
            name = following
        return name

    kept = []
    for alias in aliases:
        base = living(alias.base)
        if alias.name in alive and base is not None and base != alias.name:
            kept.append(replace(alias, base=base) if base != alias.base else alias)
    return tuple(kept) if tuple(kept) != aliases else aliases


def _repeats(repeats: tuple[Repeat, ...], nodes: tuple[Node, ...]) -> tuple[Repeat, ...]:
    """Facts recounted over the ``call`` nodes that are left."""
    if not repeats:
        return repeats
    counts: dict[str, int] = {}
    for node in nodes:
        for symbol in subgraph_symbols(node):
            name = symbol.removeprefix("@")
            counts[name] = counts.get(name, 0) + 1
    return tuple(replace(fact, count=counts[fact.name]) for fact in repeats if fact.name in counts)
