"""Which values share memory: every value of a graph is mapped to the storages its tensors lie in.

Views, in-place ops and parts of multi-output ops own nothing. The graph's alias facts come first; ops that are always
views, and ops that write into their first argument, are known by name where no fact is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.graph import Argument, Graph, Node, Ref, references
from .op_classes import kind_of, packet
from .tensors import TensorTable, called

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Storage:
    """One piece of memory. ``node`` makes it, as output number ``index``; ``bytes`` is what it spans."""

    id: int
    node: str
    index: int
    bytes: int


@dataclass(frozen=True)
class StorageTable:
    """``of[value]`` are the storages of a value's tensors, in the order of its type; empty for numbers."""

    storages: tuple[Storage, ...]
    of: dict[str, Ids]

    def of_argument(self, argument: Argument) -> Ids:
        """Storages of every value that an argument reads."""
        return tuple(dict.fromkeys(s for name in references(argument) for s in self.of.get(name, ())))

    def read(self, node: Node) -> Ids:
        """Distinct storages a node reads, in argument order."""
        return tuple(dict.fromkeys(s for name in node.operands() for s in self.of.get(name, ())))


def writes_in_place(op: str) -> bool:
    """Whether the op writes its result into its first argument (``aten.add_``), by torch's naming convention."""
    base = packet(op)
    return base.endswith("_") and not base.endswith("__") and base.startswith(("aten.", "prims."))


def storage_table(graph: Graph, table: TensorTable) -> StorageTable:
    """Assign storages to the values of a graph, in node order."""
    storages: list[Storage] = []
    of: dict[str, Ids] = {}
    # A fact that an op writes its operand does not say that its result lies there (batch norm and its statistics).
    facts: dict[str, str] = {}
    for alias in graph.aliases:
        if not alias.writes:
            facts.setdefault(alias.name, alias.base)
    passed: dict[str, list[int | None]] = {}

    def fresh(node: Node) -> Ids:
        made = []
        for index, tensor in enumerate(table.of(node.name)):
            storages.append(Storage(len(storages), node.name, index, tensor.storage))
            made.append(storages[-1].id)
        return tuple(made)

    for node in graph.nodes:
        count = len(table.of(node.name))
        if node.op == "getitem":
            of[node.name] = _part(node, table, of)
        elif node.op == "call":
            of[node.name] = _called(node, graph, table, of, passed, fresh)
        elif node.name in facts and facts[node.name] in of and node.op not in ("input", "constant"):
            of[node.name] = _shared(of[facts[node.name]], count)
        elif count and (kind_of(node.op) == "view" or writes_in_place(node.op)) and _base(node, of):
            of[node.name] = _shared(_base(node, of), count)
        else:
            of[node.name] = fresh(node)
    return StorageTable(tuple(storages), of)


def _base(node: Node, of: dict[str, Ids]) -> Ids:
    """Storages of the first argument (a list of tensors counts as one argument)."""
    return tuple(s for name in references(node.args[0]) for s in of[name]) if node.args else ()


def _shared(base: Ids, count: int) -> Ids:
    """Parts of a view all lie in its base; an in-place op on a list keeps one storage a part."""
    return base if len(base) == count else (base[0],) * count


def _part(node: Node, table: TensorTable, of: dict[str, Ids]) -> Ids:
    """The storages of one item of a tuple value."""
    source, index = node.args[0], node.args[1]
    assert isinstance(source, Ref) and isinstance(index, int)
    whole = of[source.name]
    spans = table.spans(source.name)
    return whole if spans is None else whole[spans[index]]


def _called(
    node: Node,
    graph: Graph,
    table: TensorTable,
    of: dict[str, Ids],
    passed: dict[str, list[int | None]],
    fresh: Callable[[Node], Ids],
) -> Ids:
    """Outputs of a call: those that the subgraph hands through from its inputs share the argument's storage."""
    made = list(fresh(node))
    subgraph = called(node, graph)
    if subgraph is None:
        return tuple(made)
    if subgraph.name not in passed:
        passed[subgraph.name] = handed_through(subgraph, TensorTable(subgraph, table.bindings))
    for position, source in enumerate(passed[subgraph.name]):
        if source is not None:
            made[position] = next(s for name in references(node.args[1 + source]) for s in of[name])
    return tuple(made)


def handed_through(subgraph: Graph, table: TensorTable) -> list[int | None]:
    """For each tensor among the outputs, the position of the input whose storage it shares, or None."""
    storages = storage_table(subgraph, table)
    owner = {s: position for position, node in enumerate(subgraph.inputs) for s in storages.of[node.name]}
    return [owner.get(s) for output in subgraph.outputs for name in references(output) for s in storages.of[name]]
