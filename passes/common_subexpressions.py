"""Common subexpression elimination."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from ..ir.graph import Argument, Graph, Node, Ref, argument_key
from .effects import Storages, has_effect, written_names
from .rewriting import rebuild, rename_node, with_subgraphs

#: ATen ops of two tensors that give the same bits when the two change places.
COMMUTATIVE = frozenset({"aten.add.Tensor", "aten.mul.Tensor", "aten.maximum.default", "aten.minimum.default"})


@dataclass(frozen=True)
class CommonSubexpressions:
    """Compute equal values once.

    Two nodes are equal if op, arguments and type are and nothing they read was written between them. Not merged: random
    draws, ops with effects, values in a storage that is written, two values that are both returned, and two that both
    leave the graph in storages of their own (the caller may change one of them in place).

    rewrite::

        %a: f32[4] = aten.exp.default(%x)          %a: f32[4] = aten.exp.default(%x)
        %b: f32[4] = aten.exp.default(%x)     ->
        %c: f32[4] = aten.add.Tensor(%a, %b)       %c: f32[4] = aten.add.Tensor(%a, %a)
    """

    name: ClassVar[str] = "common-subexpressions"

    def apply(self, graph: Graph) -> Graph:
        graph = with_subgraphs(graph, self.apply)
        storages = Storages(graph)
        leaving = _Leaving(graph, storages)
        version: dict[str, int] = {}
        first: dict[Hashable, Node] = {}
        replaced: dict[str, Argument] = {}
        kept = []
        for node in graph.nodes:
            node = rename_node(node, replaced)
            if storages.root(node.name) not in storages.written and not has_effect(node, graph):
                versions = tuple(version.get(storages.root(name), 0) for name in node.operands())
                kwargs = tuple((name, argument_key(value)) for name, value in node.kwargs)
                key = (
                    node.op,
                    _key(node.args, "" if node.kwargs else node.op),
                    kwargs,
                    node.type,
                    node.region,
                    versions,
                )
                earlier = first.setdefault(key, node)
                if earlier is not node and leaving.merge(earlier.name, node.name):
                    replaced[node.name] = Ref(earlier.name)
                    continue
            kept.append(node)
            for name in written_names(node, graph):
                root = storages.root(name)
                version[root] = version.get(root, 0) + 1
        return rebuild(graph, kept, replaced) if replaced else graph


class _Leaving:
    """What leaves the graph so far: values that are returned, and storages that are handed out."""

    def __init__(self, graph: Graph, storages: Storages) -> None:
        self.storages = storages
        self.returned = set(graph.output_names())
        self.escaping = set(storages.escaping)

    def merge(self, earlier: str, later: str) -> bool:
        """Let ``earlier`` stand for ``later``, unless both leave."""
        one, other = self.storages.root(earlier), self.storages.root(later)
        both_escape = one != other and one in self.escaping and other in self.escaping
        if both_escape or {earlier, later} <= self.returned:
            return False
        if later in self.returned:
            self.returned.add(earlier)
        if other in self.escaping:
            self.escaping.add(one)
        return True


def _key(arguments: tuple[Argument, ...], op: str) -> Hashable:
    items = tuple(argument_key(item) for item in arguments)
    commutes = op in COMMUTATIVE and len(arguments) == 2 and all(isinstance(item, Ref) for item in arguments)
    return tuple(sorted(items, key=repr)) if commutes else items
