"""A graph as one list of kernels over pieces of memory: regions expanded into their kernels, calls into their bodies.

A subgraph is analysed once; each call copies the result with its own memory, so that a model of equal layers costs
little more than one layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..cost_model.devices import Device
from ..cost_model.fusion import Kernel, group_kernels, kernel_of
from ..cost_model.near_operands import with_near_operands
from ..cost_model.region_memory import (
    KernelOrder,
    RegionMemory,
    estimate,
    storages_named,
    with_absorbed_products,
    with_attention_workspaces,
)
from ..cost_model.roofline import Cost, kernel_cost, total
from ..cost_model.storages import StorageTable, storage_table
from ..cost_model.tensors import Bindings, TensorTable, called
from ..errors import PlanError
from ..ir.graph import Graph, Location, Node, Ref, references
from .regions import Regions, region_graph
from .schedule import Schedule, Unit, units_of

#: Answers what a compiled region does inside, None to estimate it.
RegionBuffers = Callable[[Graph], RegionMemory | None]


@dataclass(frozen=True)
class Piece:
    """Memory of one value or of a region's inside. ``node`` is the op that makes it ("" for internal memory)."""

    name: str
    bytes: int
    dtype: str = ""
    shape: tuple[int, ...] = ()
    source: str = ""
    module: str = ""
    internal: bool = False


@dataclass(frozen=True)
class FlatKernel:
    """One launch over pieces (indices). ``ops``: names of the ops it computes, in the order of its region."""

    kind: str
    name: str
    region: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    cost: Cost
    ops: tuple[str, ...]
    source: str = ""
    module: str = ""


@dataclass
class FlatGraph:
    """``inputs[i]`` and ``outputs[i]`` are the pieces of the i-th input node and output argument (none for numbers)."""

    pieces: list[Piece] = field(default_factory=list)
    kernels: list[FlatKernel] = field(default_factory=list)
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    #: Longest module path that all its kernels share: what a call replaces by its own.
    module: str = ""
    #: How the order of the kernels of its regions was chosen, by region.
    orders: dict[str, KernelOrder] = field(default_factory=dict)


def flatten(
    graph: Graph, device: Device, bindings: Bindings | None = None, region_buffers: RegionBuffers | None = None
) -> FlatGraph:
    """Kernels and memory of a graph in running order.

    ``region_buffers`` is asked once for each distinct region with the region as a graph. Raises ShapeError for a size
    without a binding, PlanError for an answer that does not fit the region.
    """
    prepared = Schedule().apply(Regions().apply(graph))
    return _Flattener(device, bindings or {}, region_buffers).flatten(prepared, graph.name)


class _Flattener:
    def __init__(self, device: Device, bindings: Bindings, region_buffers: RegionBuffers | None) -> None:
        self.device, self.bindings, self.region_buffers = device, bindings, region_buffers
        self.done: dict[str, FlatGraph] = {}

    def flatten(self, graph: Graph, label: str) -> FlatGraph:
        table = TensorTable(graph, self.bindings)
        storages = storage_table(graph, table)
        flat = FlatGraph()
        place: dict[int, int] = {}
        units = units_of(graph)
        users = _users(graph, units, storages)
        for index, unit in enumerate(units):
            if unit.kind == "call":
                self._call(unit.nodes[0], graph, flat, place, table, storages)
                continue
            touched = {s for node in unit.nodes for s in storages.of[node.name]}
            kept = {s for s in touched if users.get(s, set()) - {index}}
            self._region(unit, graph, flat, place, table, storages, f"{label}.{unit.name}", kept)
        flat.inputs = [self._places(storages.of[node.name], flat, place, table, storages) for node in graph.inputs]
        flat.outputs = [
            self._places(storages.of_argument(output), flat, place, table, storages) for output in graph.outputs
        ]
        flat.module = _common([kernel.module for kernel in flat.kernels if kernel.module])
        return flat

    def _place(
        self, storage: int, flat: FlatGraph, place: dict[int, int], table: TensorTable, storages: StorageTable
    ) -> int:
        found = place.get(storage)
        if found is None:
            entry = storages.storages[storage]
            node, tensor = table.node(entry.node), table.of(entry.node)[entry.index]
            found = place[storage] = len(flat.pieces)
            flat.pieces.append(
                Piece(
                    name=node.name if len(table.of(node.name)) == 1 else f"{node.name}.{entry.index}",
                    bytes=entry.bytes,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    source=source_text(node.location),
                    module=node.location.module,
                )
            )
        return found

    def _places(
        self,
        ids: Sequence[int],
        flat: FlatGraph,
        place: dict[int, int],
        table: TensorTable,
        storages: StorageTable,
    ) -> tuple[int, ...]:
        return tuple(self._place(s, flat, place, table, storages) for s in ids)

    def _region(
        self,
        unit: Unit,
        graph: Graph,
        flat: FlatGraph,
        place: dict[int, int],
        table: TensorTable,
        storages: StorageTable,
        label: str,
        kept: set[int],
    ) -> None:
        inside = {node.name for node in unit.nodes}
        memory = self.region_buffers(region_graph(graph, unit.nodes, label)) if self.region_buffers else None
        groups: tuple[Kernel, ...] | None = None
        if memory is None:
            memory, groups = estimate(unit.nodes, graph, table, storages, kept, self.device)
        elif memory.problems():
            raise PlanError(f"memory of region {label!r} is not usable: {'; '.join(memory.problems()[:3])}")
        else:
            memory = with_absorbed_products(memory, unit.nodes)
            memory = with_attention_workspaces(memory, unit.nodes, table, self.device)
        if memory.order is not None:
            flat.orders[label] = memory.order
        reads: list[list[int]] = [[] for _ in memory.kernels]
        writes: list[list[int]] = [[] for _ in memory.kernels]
        for buffer in memory.buffers:
            ids = tuple(dict.fromkeys(s for value in buffer.values for s in storages_named(value, storages)))
            known = [place[s] for s in ids if s in place]
            given = any(storages.storages[s].node not in inside for s in ids)
            if known:
                piece = known[0]
            elif ids:
                piece = self._place(ids[0], flat, place, table, storages)
            else:
                piece = len(flat.pieces)
                made_by = buffer.name.split()[0]
                node = table.node(made_by) if made_by in inside else None
                flat.pieces.append(
                    Piece(
                        name=buffer.name,
                        bytes=buffer.bytes,
                        internal=True,
                        source=source_text(node.location) if node else "",
                        module=node.location.module if node else "",
                    )
                )
            for s in ids:
                place[s] = piece
            if given:
                reads[buffer.first].append(piece)
            else:
                writes[buffer.first].append(piece)
            for use in (*buffer.between, buffer.last):
                if use != buffer.first:
                    reads[use].append(piece)
            for use in buffer.changed:
                if use != buffer.first or given:
                    writes[use].append(piece)
        costs = self._costs(unit, graph, table, storages, memory, groups, kept)
        by_name = {node.name: node for node in unit.nodes}
        for index, launch in enumerate(memory.kernels):
            covered = [by_name[name] for name in launch.ops if name in by_name]
            where = _telling(covered or list(unit.nodes))
            flat.kernels.append(
                FlatKernel(
                    kind=launch.kind,
                    name=launch.name,
                    region=label,
                    reads=tuple(dict.fromkeys(reads[index])),
                    writes=tuple(dict.fromkeys(writes[index])),
                    cost=costs[index],
                    ops=tuple([node.name for node in covered]),
                    source=source_text(where),
                    module=where.module,
                )
            )

    def _costs(
        self,
        unit: Unit,
        graph: Graph,
        table: TensorTable,
        storages: StorageTable,
        memory: RegionMemory,
        groups: tuple[Kernel, ...] | None,
        kept: set[int],
    ) -> list[Cost]:
        """One cost a kernel: of its ops where they are known, else an equal share of what no kernel names."""
        if groups is not None:
            priced = [kernel_cost(kernel, graph, self.device, table, storages) for kernel in groups]
            return with_near_operands(groups, priced, table, storages, self.device)
        by_name = {node.name: node for node in unit.nodes}
        readers: dict[int, set[str]] = {}
        for node in unit.nodes:
            for s in storages.read(node):
                readers.setdefault(s, set()).add(node.name)
        members = [tuple(by_name[name] for name in launch.ops if name in by_name) for launch in memory.kernels]
        named = {node.name for nodes in members for node in nodes}
        rest = [node for node in unit.nodes if node.name not in named]
        share = Cost()
        if unnamed := members.count(()):
            unknown = group_kernels(rest, graph, table, storages, kept | _read_outside(rest, readers, storages))
            whole = total(kernel_cost(kernel, graph, self.device, table, storages) for kernel in unknown)
            share = replace(
                whole,
                flop=whole.flop // unnamed,
                bytes=whole.bytes // unnamed,
                seconds=whole.seconds / unnamed,
                matmul_flop=whole.matmul_flop // unnamed,
            )
        costs: list[Cost] = []
        launched: list[Kernel | None] = []
        for nodes, launch in zip(members, memory.kernels, strict=True):
            kernel = kernel_of(nodes, storages, kept | _read_outside(nodes, readers, storages)) if nodes else None
            launched.append(kernel)
            costs.append(
                kernel_cost(kernel, graph, self.device, table, storages, launch.nests) if kernel is not None else share
            )
        costs = with_near_operands(launched, costs, table, storages, self.device)
        return [
            cost
            if launch.seconds is None
            else Cost(cost.flop, cost.bytes, launch.seconds, cost.bound, cost.matmul_flop)
            for cost, launch in zip(costs, memory.kernels, strict=True)
        ]

    def _call(
        self,
        node: Node,
        graph: Graph,
        flat: FlatGraph,
        place: dict[int, int],
        table: TensorTable,
        storages: StorageTable,
    ) -> None:
        body = called(node, graph)
        if body is None:
            raise PlanError(f"call %{node.name} names no subgraph of {graph.name!r}", where=source_text(node.location))
        inner = self.done.get(body.name)
        if inner is None:
            inner = self.done[body.name] = self.flatten(body, body.name)
        mapped: list[int] = [-1] * len(inner.pieces)
        if len(inner.inputs) != len(node.args) - 1:
            raise PlanError(
                f"call %{node.name} gives {len(node.args) - 1} values to {body.name!r}, which has {len(inner.inputs)}",
                where=source_text(node.location),
            )
        for pieces, argument in zip(inner.inputs, node.args[1:], strict=True):
            outer = [s for name in references(argument) for s in storages.of[name]]
            for piece, s in zip(pieces, outer, strict=True):
                mapped[piece] = self._place(s, flat, place, table, storages)
        new = node.location.module or self._module_of_parameters(node, table)
        old = ".".join(inner.module.split(".")[: new.count(".") + 1])
        for index, own in enumerate(inner.pieces):
            if mapped[index] < 0:
                mapped[index] = len(flat.pieces)
                moved = _moved(own.module, old, new)
                flat.pieces.append(Piece(own.name, own.bytes, own.dtype, own.shape, own.source, moved, own.internal))
        flat.orders.update(inner.orders)
        for kernel in inner.kernels:
            flat.kernels.append(
                FlatKernel(
                    kernel.kind,
                    kernel.name,
                    kernel.region,
                    tuple([mapped[piece] for piece in kernel.reads]),
                    tuple([mapped[piece] for piece in kernel.writes]),
                    kernel.cost,
                    kernel.ops,
                    kernel.source,
                    _moved(kernel.module, old, new),
                )
            )
        made = [mapped[piece] for pieces in inner.outputs for piece in pieces]
        for s, piece in zip(storages.of[node.name], made, strict=True):
            place[s] = piece

    def _module_of_parameters(self, node: Node, table: TensorTable) -> str:
        """Where a call without a location belongs: the module that holds all parameters it is given."""
        given = [table.node(argument.name) for argument in node.args[1:] if isinstance(argument, Ref)]
        return _common([n.location.module for n in given if n.role == "parameter" and n.location.module])


def _users(graph: Graph, units: Sequence[Unit], storages: StorageTable) -> dict[int, set[int]]:
    """Storage -> the units that read it, by index; -1 stands for the graph's outputs."""
    users: dict[int, set[int]] = {}
    for index, unit in enumerate(units):
        for node in unit.nodes:
            for s in storages.read(node):
                users.setdefault(s, set()).add(index)
    for output in graph.outputs:
        for s in storages.of_argument(output):
            users.setdefault(s, set()).add(-1)
    return users


def _read_outside(members: Sequence[Node], readers: Mapping[int, set[str]], storages: StorageTable) -> set[int]:
    """Of the storages that ``members`` make or read, those that other ops of the region read too. ``readers``: names of
    the region's ops that read each storage."""
    names = {node.name for node in members}
    own = {s for node in members for s in (*storages.of.get(node.name, ()), *storages.read(node))}
    return {s for s in own if not readers.get(s, set()) <= names}


def source_text(location: Location) -> str:
    """``model.py:88 "h = self.up(x)"``, empty if unknown."""
    if not location.file:
        return ""
    text = f"{os.path.basename(location.file)}:{location.line}"
    return f'{text} "{location.source}"' if location.source else text


def _telling(nodes: Sequence[Node]) -> Location:
    """The location that says most about a kernel: the last of its ops that has one."""
    return next((node.location for node in reversed(nodes) if node.location), Location())


def _common(paths: Sequence[str]) -> str:
    """The longest dotted path that starts all paths."""
    shared: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _moved(path: str, old: str, new: str) -> str:
    """A module path inside a repeated layer, as the layer's other occurrence names it."""
    if not new or not path:
        return path or new
    if not old or not (path == old or path.startswith(old + ".")):
        return new
    return new + path[len(old) :]
