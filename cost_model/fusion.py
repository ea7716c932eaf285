"""Group the ops of a region into the kernels a fusing compiler makes of them.

Library ops stand alone. Pointwise ops, reductions and indexing join the kernel of what they read, when the loops agree:
a consumer of a reduction must run over the reduced tensor again (softmax, layer norm) or over its result. Kernels carry
levels, and an edge between kernels always goes to a higher level, so that no cycle of kernels can arise. This predicts
what is stored and what is not where the compiler's own answer is not at hand.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.graph import Graph, Node
from .op_classes import FUSABLE, SCATTER, kind_of, packet
from .storages import StorageTable, storage_table, writes_in_place
from .tensors import TensorTable


@dataclass(frozen=True)
class Kernel:
    """Ops that run together. ``reads`` are storages from outside of the kernel, ``writes`` storages it makes or changes
    that are used outside of it (views resolved)."""

    kind: str
    nodes: tuple[Node, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass
class _Group:
    """A kernel while it grows. ``spaces`` are the element counts its loops may have."""

    level: int
    kind: str
    fusable: bool
    nodes: list[int] = field(default_factory=list)
    reduced: set[tuple[int, int]] = field(default_factory=set)


def group_kernels(
    nodes: Sequence[Node],
    graph: Graph,
    table: TensorTable | None = None,
    storages: StorageTable | None = None,
    kept: set[int] | None = None,
) -> tuple[Kernel, ...]:
    """Kernels of ``nodes`` (of ``graph``, in order), in an order that respects what they read.

    ``kept`` are storages used after these nodes; by default those that other nodes or the graph's outputs use.
    """
    table = table or TensorTable(graph)
    storages = storages or storage_table(graph, table)
    work = [node for node in nodes if kind_of(node.op) not in ("structural", "view") or node.op == "call"]
    if kept is None:
        kept = used_elsewhere(nodes, graph, storages)
    return _finish(_grow(work, table, storages), work, storages, kept)


def used_elsewhere(nodes: Sequence[Node], graph: Graph, storages: StorageTable) -> set[int]:
    """Storages that other nodes of the graph read, or that it returns."""
    inside = {node.name for node in nodes}
    used = [storages.read(node) for node in graph.nodes if node.name not in inside]
    used += [storages.of_argument(output) for output in graph.outputs]
    return {s for ids in used for s in ids}


def _grow(work: list[Node], table: TensorTable, storages: StorageTable) -> dict[int, _Group]:
    """Node position -> its group. Positions of one group share the object."""
    last_writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    group_of: dict[int, _Group] = {}
    for position, node in enumerate(work):
        kind = kind_of(node.op)
        read = storages.read(node)
        before = [last_writer[s] for s in read if s in last_writer]
        if writes_in_place(node.op):  # what reads the old contents comes first
            before += [p for s in storages.of[node.name] for p in readers.get(s, ())]
        for s in read:
            readers.setdefault(s, []).append(position)
        producers = {id(group_of[p]): group_of[p] for p in before}
        level = max((group.level for group in producers.values()), default=-1)
        top = [group for group in producers.values() if group.level == level]
        fusable = kind in FUSABLE and (kind != "index" or packet(node.op) not in SCATTER)
        sizes = _space(node, table)
        if fusable and top and all(group.fusable and _agree(group, kind, sizes) for group in top) and _alike(top):
            group = _merge(top, group_of)
        else:
            group = _Group(level + 1, kind, kind in FUSABLE)
        group.nodes.append(position)
        group_of[position] = group
        if kind == "reduction":
            group.kind = "reduction"
            group.reduced.add(sizes)
        for s in storages.of[node.name]:
            last_writer[s] = position
    return group_of


def _space(node: Node, table: TensorTable) -> tuple[int, int]:
    """Elements the op's loops run over (the larger of input and output), and elements of its largest result."""
    out = max((tensor.elements for tensor in table.of(node.name)), default=1)
    if kind_of(node.op) != "reduction":
        return out, out
    return max(out, max((tensor.elements for tensor in table.read(node)), default=1)), out


def _agree(group: _Group, kind: str, sizes: tuple[int, int]) -> bool:
    """Whether a consumer can run in the loops of a group: without a reduction always, else over the same elements."""
    if not group.reduced:
        return True
    if kind == "reduction":
        return any(sizes[0] in (full, result) for full, result in group.reduced)
    return any(sizes[1] in (full, result) for full, result in group.reduced)


def _alike(groups: list[_Group]) -> bool:
    """Groups with reductions may only merge when they reduce tensors of one size."""
    return len({full for group in groups for full, _ in group.reduced}) <= 1


def _merge(groups: list[_Group], group_of: dict[int, _Group]) -> _Group:
    first, *others = groups
    for other in others:
        first.nodes += other.nodes
        first.reduced |= other.reduced
        first.kind = "reduction" if "reduction" in (first.kind, other.kind) else first.kind
        for position in other.nodes:
            group_of[position] = first
    return first


def _finish(
    group_of: dict[int, _Group], work: list[Node], storages: StorageTable, kept: set[int]
) -> tuple[Kernel, ...]:
    """Order the groups (earliest op first, producers before consumers) and name what each reads and writes."""
    groups = {id(group): group for group in group_of.values()}
    readers: dict[int, set[int]] = {key: set() for key in groups}
    waiting: dict[int, int] = dict.fromkeys(groups, 0)
    used_by: dict[int, set[int]] = {}
    producer: dict[int, int] = {}

    def before(earlier: int | None, later: int) -> None:
        if earlier is not None and earlier != later and later not in readers[earlier]:
            readers[earlier].add(later)
            waiting[later] += 1

    for position, node in enumerate(work):
        key = id(group_of[position])
        if writes_in_place(node.op):
            for s in storages.of[node.name]:
                for reader in used_by.get(s, ()):
                    before(reader, key)
        for s in storages.read(node):
            used_by.setdefault(s, set()).add(key)
            before(producer.get(s), key)
        for s in storages.of[node.name]:
            producer[s] = key
    first = {key: min(group.nodes) for key, group in groups.items()}
    ready = [(first[key], key) for key, count in waiting.items() if not count]
    heapq.heapify(ready)
    kernels: list[Kernel] = []
    while ready:
        _, key = heapq.heappop(ready)
        members = tuple(work[position] for position in sorted(groups[key].nodes))
        kernels.append(_kernel(key, groups[key].kind, members, storages, used_by, kept))
        for reader in readers[key]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (first[reader], reader))
    assert len(kernels) == len(groups), "kernels depend on each other in a circle"
    return tuple(kernels)


def _kernel(
    key: int,
    kind: str,
    members: tuple[Node, ...],
    storages: StorageTable,
    used_by: dict[int, set[int]],
    kept: set[int],
) -> Kernel:
    own, reads, made = _traffic(members, storages)
    alone = len(members) == 1
    writes = tuple(s for s in made if alone or s not in own or s in kept or used_by.get(s, set()) - {key})
    return Kernel(kind, members, reads, writes)


def _traffic(members: tuple[Node, ...], storages: StorageTable) -> tuple[set[int], tuple[int, ...], tuple[int, ...]]:
    """Storages that the ops bring into being, those they read from outside, and those they write."""
    inside = {node.name for node in members}
    made = tuple(dict.fromkeys(s for node in members for s in storages.of[node.name]))
    own = {s for s in made if storages.storages[s].node in inside}
    reads = tuple(dict.fromkeys(s for node in members for s in storages.read(node) if s not in own))
    return own, reads, made


def kernel_of(members: tuple[Node, ...], storages: StorageTable, kept: set[int]) -> Kernel:
    """The given ops (at least one) as one kernel, whatever a compiler would do; what is not ``kept`` stays inside."""
    kinds = [kind_of(node.op) for node in members]
    kind = min(kinds, key=lambda k: _LEADING.index(k) if k in _LEADING else len(_LEADING))
    _, reads, made = _traffic(members, storages)
    return Kernel(kind, members, reads, tuple(s for s in made if s in kept))


#: The kind of work that names a kernel of several kinds, first match.
_LEADING = (
    "convolution",
    "gemm",
    "attention",
    "cascade",
    "opaque",
    "sort",
    "reduction",
    "index",
    "pointwise",
    "creation",
    "view",
)
