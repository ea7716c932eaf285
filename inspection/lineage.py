"""What became of each value when a pass ran: it stayed, another took its place, it was folded into its readers, it
moved into a subgraph, or nobody needed it any more.

Nothing is recorded for this: it is read off the two graphs, by names, by ``from(...)``, and by what a value's readers
read in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..ir.graph import Argument, Graph, Node, Ref, Symbol

#: Path of subgraph names ("" for the outermost graph) and name of the value in it.
Place = tuple[str, str]


@dataclass(frozen=True)
class Fate:
    """``how``: kept, replaced, folded (into its readers), moved (into or out of a subgraph), fused, unread."""

    how: str
    places: tuple[Place, ...] = ()


def scopes(graph: Graph) -> dict[str, Graph]:
    """The graph under ``""`` and each of its subgraphs under its path, ``layer/attention``."""
    return dict(_scopes(graph, ""))


def _scopes(graph: Graph, path: str) -> Iterator[tuple[str, Graph]]:
    yield path, graph
    for name, inner in graph.subgraphs.items():
        yield from _scopes(inner, f"{path}/{name}" if path else name)


def fates(before: Graph, after: Graph) -> dict[Place, Fate]:
    """The fate of every value of ``before``."""
    old, new = scopes(before), scopes(after)
    moved = _outlined(old, new)
    found: dict[Place, Fate] = {}
    for scope, graph in old.items():
        homes = [home for home in new if home == scope or (_last(home) == _last(scope) and home not in old)]
        if not homes:
            found |= _inlined(scope, graph, old, new)
            continue
        parts = [_Within(scope, graph, home, new[home], moved).fates() for home in homes]
        for node in graph.nodes:
            each = [part[node.name] for part in parts]
            living = [fate for fate in each if fate.places] or each
            places = tuple(dict.fromkeys(place for fate in living for place in fate.places))
            found[scope, node.name] = Fate(living[0].how, places)
    return found


def _last(scope: str) -> str:
    return scope.rpartition("/")[2]


class _Within:
    """Fates of the values of one scope, as they are found in one scope of the later graph."""

    def __init__(self, scope: str, old: Graph, home: str, new: Graph, moved: Mapping[Place, tuple[Place, ...]]) -> None:
        self.scope, self.old, self.home, self.moved = scope, old, home, moved
        self.old_nodes, self.new_nodes = old.by_name(), new.by_name()
        self.users = old.users()
        self.outputs = _by_path(old.outputs), _by_path(new.outputs)
        self.origins: dict[str, list[str]] = {}
        for node in new.nodes:
            for name in re.findall(r"[\w.]+", node.origin):
                if name not in self.new_nodes:
                    self.origins.setdefault(name, []).append(node.name)

    def fates(self) -> dict[str, Fate]:
        found: dict[str, Fate] = {}
        for node in reversed(self.old.nodes):  # readers first
            found[node.name] = self._fate(node, found)
        return found

    def _fate(self, node: Node, later: Mapping[str, Fate]) -> Fate:
        name = node.name
        if (self.scope, name) in self.moved:
            return Fate("moved", self.moved[self.scope, name])
        if name in self.new_nodes:
            return Fate("kept", ((self.home, name),))
        if name in self.origins:
            fused = any(self.new_nodes[heir].op.startswith("effcc.cascade") for heir in self.origins[name])
            return Fate("fused" if fused else "replaced", tuple((self.home, heir) for heir in self.origins[name]))
        heir = self._successor(node)
        if heir is not None:
            return Fate("replaced", ((self.home, heir),))
        readers = self.users[name]
        places = tuple(dict.fromkeys(place for reader in readers for place in later[reader.name].places))
        return Fate("folded", places) if places else Fate("unread")

    def _successor(self, node: Node) -> str | None:
        """What readers, or the outputs, read now where they read this value."""
        pairs = [
            (_by_path((reader.args, reader.kwargs)), _by_path((now.args, now.kwargs)))
            for reader in self.users[node.name]
            if (now := self.new_nodes.get(reader.name)) is not None and now.op == reader.op
        ]
        for before, after in (*pairs, self.outputs):
            if before.keys() != after.keys():
                continue
            for path, name in before.items():
                heir = self.new_nodes.get(after[path])
                if name == node.name and heir is not None and heir.type == node.type:
                    return heir.name
        return None


def _by_path(value: object, path: tuple[int, ...] = ()) -> dict[tuple[int, ...], str]:
    """Where in an argument tree each value is read."""
    if isinstance(value, Ref):
        return {path: value.name}
    found: dict[tuple[int, ...], str] = {}
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            found |= _by_path(item, (*path, index))
    return found


def calls_of(graph: Graph, name: str) -> list[Node]:
    """The nodes that call a subgraph, in order."""
    return [node for node in graph.nodes if node.op == "call" and _target(node.args) == name]


def _target(args: Sequence[Argument]) -> str:
    first = args[0] if args else None
    return first.text.removeprefix("@") if isinstance(first, Symbol) else ""


def _outlined(old: Mapping[str, Graph], new: Mapping[str, Graph]) -> dict[Place, tuple[Place, ...]]:
    """Values of equal stretches that became one subgraph: each op of a stretch is the op at its place in the body."""
    found: dict[Place, tuple[Place, ...]] = {}
    for scope, graph in new.items():
        if scope not in old:
            continue
        before = old[scope].nodes
        position = {node.name: index for index, node in enumerate(before)}
        for name in graph.subgraphs.keys() - old[scope].subgraphs.keys():
            inner = f"{scope}/{name}" if scope else name
            body = [node for node in graph.subgraphs[name].nodes if node.op != "input"]
            start = position.get(body[0].name) if body else None
            if start is None:
                continue
            for copy in range(len(calls_of(graph, name))):
                stretch = before[start + copy * len(body) : start + (copy + 1) * len(body)]
                if [node.op for node in stretch] != [node.op for node in body]:
                    break
                for was, now in zip(stretch, body, strict=True):
                    found[scope, was.name] = ((inner, now.name),)
    return found


def _inlined(scope: str, graph: Graph, old: Mapping[str, Graph], new: Mapping[str, Graph]) -> dict[Place, Fate]:
    """Values of a subgraph that is gone: what is new elsewhere with the same op and type from the same line."""
    fresh: dict[object, list[Place]] = {}
    for other, inner in new.items():
        known = old[other].by_name() if other in old else {}
        for node in inner.nodes:
            if node.name not in known or known[node.name].op != node.op:
                fresh.setdefault((node.op, node.type, node.location.file, node.location.line), []).append(
                    (other, node.name)
                )
    found = {}
    for node in graph.nodes:
        places = fresh.get((node.op, node.type, node.location.file, node.location.line), [])
        found[scope, node.name] = Fate("moved", tuple(places)) if places else Fate("unread")
    return found
