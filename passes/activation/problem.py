"""A joint graph (forward and backward in one) as the planner of activations sees it: ops, values, bytes and seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...cost_model.devices import Device
from ...cost_model.op_additions import stored_seconds
from ...cost_model.op_classes import FUSABLE, SCATTER, kind_of, packet
from ...cost_model.outside_loss import NAME, outside_loss_bytes
from ...cost_model.roofline import fused_seconds, op_cost
from ...cost_model.storages import Storage, StorageTable, storage_table
from ...cost_model.tensors import Bindings, TensorTable
from ...ir.graph import Argument, Graph, Node, references
from ..effects import PURE_NAMESPACES, has_effect, split_op
from .token_shares import TokenRows

#: Ops whose result may differ from run to run on a GPU, because atomic additions come in any order.
UNORDERED = frozenset(
    "scatter_add scatter_reduce index_add index_put _unsafe_index_put embedding_dense_backward bincount".split()
)
#: (op, sizes) -> bytes that it holds besides operands and results.
Workspaces = Callable[[Node, TensorTable], int]
#: Share of its own traffic that a fusable op costs when it is recomputed inside the kernel that uses its result.
FUSED_SHARE = 0.5


@dataclass(frozen=True)
class Value:
    """One storage. ``op`` makes it (-1: an input of the graph); ``node`` and ``part`` name it in the graph."""

    id: int
    node: str
    part: int
    bytes: int
    op: int
    #: What keeping it costs by itself: a generated kernel then writes it out, and masks are read back lane by lane.
    keep_seconds: float = 0.0


@dataclass(frozen=True)
class Op:
    """One op that does work. ``forward``: it needs nothing of the backward; ``fused``: it runs inside a generated
    kernel; ``inlined``: its result need not lie in memory for consumers in generated kernels; ``banned``: it must not
    run a second time. ``seconds``: what running it again costs."""

    index: int
    name: str
    op: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    seconds: float
    forward: bool
    fused: bool
    inlined: bool
    banned: bool
    source: str = ""
    module: str = ""
    #: False for what the caller runs between forward and backward.
    in_graph: bool = True


@dataclass(frozen=True)
class JointProblem:
    """``constant`` are the bytes of what lives through the whole step: inputs, parameters, and what ``outside`` counts
    (optimizer state, other graphs). ``primals`` are inputs, ``tangents`` the gradients given to the backward."""

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    primals: frozenset[int]
    tangents: frozenset[int]
    forward_outputs: tuple[int, ...]
    backward_outputs: tuple[int, ...]
    #: Primals that the forward overwrites: what they held is not at hand in the backward.
    overwritten: frozenset[int]
    constant: int
    #: Consumers of each value, by op index.
    users: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    #: Values that each node's result lies in.
    of: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    #: Row-wise op -> values that it reads by rows (of tokens); the others it reads whole.
    row_reads: Mapping[int, frozenset[int]] = field(default_factory=dict)
    #: Values of which some rows may be swapped and the others computed again; the number of rows.
    divisible: frozenset[int] = frozenset()
    tokens: int = 0

    @functools.cached_property
    def distinct_reads(self) -> tuple[tuple[int, ...], ...]:
        """What each op reads, each value once."""
        return tuple(tuple(dict.fromkeys(op.reads)) for op in self.ops)

    @functools.cached_property
    def library_users(self) -> Mapping[int, tuple[int, ...]]:
        """Consumers of each value that are no generated kernels, by op index."""
        return {v: tuple(u for u in users if not self.ops[u].fused) for v, users in self.users.items()}

    @property
    def seconds(self) -> float:
        """Time of all ops, each once."""
        return sum(op.seconds for op in self.ops)

    def name(self, value: int) -> str:
        entry = self.values[value]
        return entry.node

    def needed_by_backward(self) -> frozenset[int]:
        """Values of the forward that ops of the backward read."""
        made = {v for op in self.ops if op.forward for v in op.writes}
        return frozenset(v for op in self.ops if not op.forward for v in op.reads if v in made)


def joint_problem(
    graph: Graph,
    device: Device,
    forward_outputs: int,
    *,
    bindings: Bindings | None = None,
    backward_only: Collection[str] = (),
    pinned: Collection[str] = (),
    outside: int = 0,
    outside_loss: bool = False,
    workspaces: Workspaces | None = None,
    rows: TokenRows | None = None,
) -> JointProblem:
    """The problem of a joint graph whose first ``forward_outputs`` outputs are the forward's.

    args:
        backward_only: nodes that must run in the backward whatever they read.
        pinned: nodes that may not be recomputed, beside those that draw random numbers, write, or are not known.
        outside: bytes that are held all along besides.
        outside_loss: between forward and backward the caller computes a loss of the outputs, and its gradient: an op
            without a node that makes the gradients of the outputs (see ``cost_model.outside_loss``).
        workspaces: says what a library's op holds for itself while it runs, which counts as a result that nothing
            reads.
        rows: which ops are row-wise; None: no value may be split by tokens.

    Raises ShapeError for a symbolic size without a binding.
    """
    table = TensorTable(graph, bindings)
    storages = storage_table(graph, table)
    inputs = {s: node for node in graph.inputs for s in storages.of[node.name]}
    tangents = {s for s, node in inputs.items() if node.role == "tangent"}
    gradients = [node for node in graph.inputs if node.role == "tangent"]
    late = {*backward_only, *(node.name for node in gradients)}
    lost = outside_loss_bytes(graph, forward_outputs, gradients, bindings) if outside_loss else 0
    ops: list[Op] = []
    maker: dict[int, int] = {}
    overwritten: set[int] = set()
    loss: int | None = None
    own_memory: list[tuple[str, int, int]] = []
    for node in graph.nodes:
        if node.op == "input":
            continue
        if node.name in late or any(name in late for name in node.operands()):
            late.add(node.name)
        kind = kind_of(node.op)
        own = tuple(s for s in storages.of[node.name] if storages.storages[s].node == node.name)
        if node.op in ("getitem", "constant") or (kind == "view" and not own):
            for s in own:
                maker.setdefault(s, -1)
            continue
        if lost and loss is None and node.name in late:
            loss = len(ops)
            ops.append(_loss_op(loss, (*sorted(tangents), len(storages.storages))))
        reads = storages.read(node)
        if not own:  # written in place
            overwritten.update(s for s in storages.of[node.name] if s in inputs)
        index = len(ops)
        maker.update(dict.fromkeys(own, index))
        ops.append(
            Op(
                index=index,
                name=node.name,
                op=node.op,
                reads=tuple(s for s in reads),
                writes=own,
                seconds=_seconds(node, graph, device, table),
                forward=node.name not in late,
                fused=kind in FUSABLE,
                inlined=kind in ("pointwise", "creation", "index")
                and packet(node.op) not in SCATTER
                and len(own) == 1
                and packet(node.op) != "aten.cat",
                banned=node.name in pinned or not may_run_again(node, graph, device),
                source=f"{node.location.file.rpartition('/')[2]}:{node.location.line}" if node.location.file else "",
                module=node.location.module,
            )
        )
        held = workspaces(node, table) if workspaces is not None and not ops[index].fused else 0
        if held:
            own_memory.append((node.name, held, index))
    values = [
        _value(s, maker.get(s.id, -1) if s.id not in inputs else -1, ops, device, table) for s in storages.storages
    ]
    if loss is not None:
        values.append(Value(len(values), NAME, 0, lost, loss))
    for name, held, index in own_memory:
        ops[index] = replace(ops[index], writes=(*ops[index].writes, len(values)))
        values.append(Value(len(values), name, -1, held, index))
    outputs = [_storages_of(output, storages) for output in graph.outputs]
    constant = sum(values[s].bytes for s in inputs if s not in tangents) + outside
    users: dict[int, list[int]] = {}
    for op in ops:
        for value in op.reads:
            users.setdefault(value, []).append(op.index)
    rows = rows or TokenRows()
    row_reads = {
        op.index: frozenset(s for name in rows.reads[op.name] for s in storages.of[name])
        for op in ops
        if op.name in rows.reads and op.forward
    }
    return JointProblem(
        ops=tuple(ops),
        values=tuple(values),
        primals=frozenset(inputs) - tangents,
        tangents=frozenset(tangents),
        forward_outputs=tuple(dict.fromkeys(s for ids in outputs[:forward_outputs] for s in ids)),
        backward_outputs=tuple(dict.fromkeys(s for ids in outputs[forward_outputs:] for s in ids)),
        overwritten=frozenset(overwritten),
        constant=constant,
        users={value: tuple(found) for value, found in users.items()},
        of=storages.of,
        row_reads=row_reads,
        divisible=frozenset(
            op.writes[0]
            for op in ops
            if op.index in row_reads and op.name in rows.divisible and len(op.writes) == 1 and not op.banned
        ),
        tokens=rows.tokens,
    )


def _loss_op(index: int, writes: tuple[int, ...]) -> Op:
    """The caller's loss and its gradient. What it reads, the outputs, is held all along."""
    return Op(index, NAME, NAME, (), writes, 0.0, forward=False, fused=False, inlined=False, banned=True,
              in_graph=False)  # fmt: skip


def may_run_again(node: Node, graph: Graph, device: Device) -> bool:
    """Whether a second run of the op gives the same bits and does nothing else: no random draws, no writes, no
    collectives, nothing unknown, and no additions in an order that varies."""
    namespace, name, _ = split_op(node.op)
    if has_effect(node, graph) or namespace not in PURE_NAMESPACES or kind_of(node.op) == "collective":
        return False
    return device.kind == "cpu" or name not in UNORDERED


def _value(storage: Storage, op: int, ops: Sequence[Op], device: Device, table: TensorTable) -> Value:
    written = 0.0
    if op >= 0 and ops[op].inlined:
        tensor = table.of(storage.node)[storage.index]
        written = storage.bytes / device.bandwidth + stored_seconds(tensor, device.added)
    return Value(storage.id, storage.node, storage.index, storage.bytes, op, written)


def _storages_of(output: Argument, storages: StorageTable) -> Sequence[int]:
    return [s for name in references(output) for s in storages.of.get(name, ())]


def _seconds(node: Node, graph: Graph, device: Device, table: TensorTable) -> float:
    if kind_of(node.op) in FUSABLE:
        return fused_seconds(node, graph, device, table, FUSED_SHARE)
    return op_cost(node, graph, device, table=table).seconds
