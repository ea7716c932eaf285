"""The order in which a graph's regions and calls run."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ScheduleError
from ..ir.graph import Graph, Node
from .effects import Storages, has_effect, writes_memory
from .rewriting import rebuild, with_subgraphs


@dataclass(frozen=True)
class Unit:
    """What runs at once: a ``region`` (its nodes in order) or one ``call``."""

    kind: str
    name: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Schedule:
    """Put the nodes of each region next to each other, in the order of the regions' first nodes where what they read
    allows it. Effects (writes, random draws) keep their order. A graph whose regions are already in order is unchanged;
    a graph without regions keeps its order.

    rewrite::

        %a = aten.exp.default(%x)       region 0      ->   %a = aten.exp.default(%x)
        %b = call(@layer, %x)                              %c = aten.neg.default(%a)
        %c = aten.neg.default(%a)       region 0           %b = call(@layer, %x)
    """

    name: ClassVar[str] = "schedule"

    def apply(self, graph: Graph) -> Graph:
        graph = with_subgraphs(graph, self.apply)
        units = _keys(graph)
        work = [
            key for node, key in zip(graph.nodes, units, strict=True) if node.op == "call" or node.region is not None
        ]
        if _contiguous(work):
            return graph
        order = _order(graph, units)
        members: dict[str, list[Node]] = {}
        for node, key in zip(graph.nodes, units, strict=True):
            members.setdefault(key, []).append(node)
        return rebuild(graph, (node for key in order for node in members[key]))


def units_of(graph: Graph) -> tuple[Unit, ...]:
    """Regions and calls of a scheduled graph, in order. Nodes of no region (inputs, parts of calls) are in none."""
    units: list[Unit] = []
    run: list[Node] = []
    for node in graph.nodes:
        if run and node.op not in ("input", "constant") and node.region is not None and node.region != run[-1].region:
            units.append(Unit("region", f"region{run[0].region}", tuple(run)))
            run = []
        if node.op == "call":
            if run:
                units.append(Unit("region", f"region{run[0].region}", tuple(run)))
                run = []
            units.append(Unit("call", node.name, (node,)))
        elif node.region is not None:
            run.append(node)
    if run:
        units.append(Unit("region", f"region{run[0].region}", tuple(run)))
    return tuple(units)


def _keys(graph: Graph) -> list[str]:
    return [f"region {node.region}" if node.region is not None else f"node {node.name}" for node in graph.nodes]


def _contiguous(keys: list[str]) -> bool:
    """Whether no region is interrupted by a call or another region."""
    seen: set[str] = set()
    previous = ""
    for key in keys:
        if key != previous and key in seen:
            return False
        seen.add(key)
        previous = key
    return True


def _order(graph: Graph, keys: list[str]) -> list[str]:
    """Topological order of the units; among those that are ready the one that stands first. Units of a circle are not
    possible here: a region in a circle with a call is split by the order of the original nodes, and refused."""
    first: dict[str, int] = {}
    key_of: dict[str, str] = {}
    for position, (node, key) in enumerate(zip(graph.nodes, keys, strict=True)):
        first.setdefault(key, position)
        key_of[node.name] = key
    after: dict[str, set[str]] = {key: set() for key in first}
    for earlier, later in _edges(graph):
        if key_of[earlier] != key_of[later]:
            after[key_of[earlier]].add(key_of[later])
    waiting = dict.fromkeys(first, 0)
    for followers in after.values():
        for follower in followers:
            waiting[follower] += 1
    ready = [(first[key], key) for key, count in waiting.items() if not count]
    heapq.heapify(ready)
    order: list[str] = []
    while ready:
        _, key = heapq.heappop(ready)
        order.append(key)
        for follower in sorted(after[key]):
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(ready, (first[follower], follower))
    if len(order) < len(first):
        stuck = sorted(set(first) - set(order), key=lambda key: first[key])
        raise ScheduleError(
            f"regions of graph {graph.name!r} need each other's results: {', '.join(stuck[:5])}",
            remedy="run the pass `regions` again: a region may not surround what depends on it",
        )
    return order


def _edges(graph: Graph) -> list[tuple[str, str]]:
    """Pairs (earlier, later) that must keep their order: uses, effects among themselves, reads around writes."""
    edges = [(name, node.name) for node in graph.nodes for name in node.operands()]
    storages = Storages(graph)
    effect: Node | None = None
    readers: dict[str, list[str]] = {}
    writer: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "input":
            continue
        roots = {storages.root(name) for name in node.operands()} & storages.written
        edges += [(writer[root], node.name) for root in roots if root in writer]
        if has_effect(node, graph):
            if effect is not None:
                edges.append((effect.name, node.name))
            effect = node
        if writes_memory(node, graph):
            for root in roots:
                edges += [(reader, node.name) for reader in readers.get(root, ()) if reader != node.name]
                writer[root] = node.name
        for root in roots:
            readers.setdefault(root, []).append(node.name)
    return edges
