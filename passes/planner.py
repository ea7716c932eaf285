"""Make the plan of a model from its captured graphs: steps in a fixed order, buffers with lifetimes, time and peak.

The timeline is one training step (forward, backward, optimizer) or one inference call. Each kernel of a region is one
step, so that a position of the timeline is a moment at which memory can be counted exactly; the steps of one region
share ``Step.region``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..cost_model.devices import Device
from ..cost_model.liveness import reserved_bytes
from ..cost_model.optimizers import optimizer_cost, optimizer_workspace
from ..cost_model.simulator import simulate
from ..cost_model.tensors import Bindings
from ..errors import PlanError
from ..ir.graph import Graph, Node
from ..ir.plan import TIERS, Buffer, GraphPlan, InputSpec, Plan, Solver, Step
from ..ir.structural_hash import graph_hash, op_hashes
from ..ir.types import TensorType
from .flatten import FlatGraph, RegionBuffers, flatten

#: (name, bytes, module path).
StateEntry = tuple[str, int, str]

#: Roles whose memory an allocation plan places; the rest is held by the user or the optimizer.
PLACED_ROLES = {"saved": "saved", "scratch": "scratch", "workspace": "scratch"}


@dataclass(frozen=True)
class StateBytes:
    """What a training process holds besides the graphs' own values. ``gradients`` are only needed for parameters whose
    gradient no given backward graph computes."""

    parameters: tuple[StateEntry, ...] = ()
    gradients: tuple[StateEntry, ...] = ()
    optimizer: tuple[StateEntry, ...] = ()
    buffers: tuple[StateEntry, ...] = ()


@dataclass
class _Memory:
    """A buffer while the plan is made. ``lower`` is -1 until a step touches it; ``kept`` ones live to the end."""

    name: str
    bytes: int
    role: str
    lower: int = -1
    upper: int = 0
    kept: bool = False
    dtype: str = ""
    shape: tuple[int, ...] = ()
    source: str = ""
    module: str = ""

    def alike(self, other: _Memory) -> bool:
        """Of one size and dtype. Shapes may differ: an output may be a view of what is stored."""
        return (self.bytes, self.dtype) == (other.bytes, other.dtype)


@dataclass
class _Builder:
    memory: list[_Memory] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    graphs: list[GraphPlan] = field(default_factory=list)
    #: Outputs of graphs so far that no later graph took as an input (graphs are joined where Dynamo broke the model).
    handed: list[int] = field(default_factory=list)
    #: Memory of a graph's input -> memory of its gradient, for inputs that another graph made.
    gradient_of: dict[int, int] = field(default_factory=dict)

    def take_handed(self, wanted: _Memory) -> int | None:
        """The earliest output of the same type that an earlier graph handed out, once."""
        for identity in self.handed:
            if self.memory[identity].alike(wanted):
                self.handed.remove(identity)
                return identity
        return None

    def add(self, memory: _Memory) -> int:
        self.memory.append(memory)
        return len(self.memory) - 1


def make_plan(
    model_name: str,
    graphs: Sequence[Graph],
    device: Device,
    state: StateBytes | None = None,
    region_buffers: RegionBuffers | None = None,
    budget: int | None = None,
    optimizer: str = "",
    bindings: Bindings | None = None,
    place: bool = True,
) -> Plan:
    """Plan for running ``graphs`` (each forward in call order, then the backwards) on ``device``.

    A backward graph belongs to the latest forward before it that has none; its saved inputs are that forward's saved
    outputs in order, and its outputs the gradients of that forward's inputs in order (AOTAutograd's convention).

    Args:
        state: parameters, gradients, optimizer state and buffers in bytes. Parameters that the graphs take are matched
            to entries by name, else by size.
        region_buffers: answers what a compiled region does inside (see ``RegionMemory``); without it, or where it
            answers None, kernels and memory are estimated.
        budget: bytes of the device tier; a plan above it is made all the same, with a note.
        optimizer: name of a ``torch.optim`` class (``adamw``); adds the optimizer's step when there is a backward.
        bindings: values of the shape symbols.
        place: whether saved and scratch memory get offsets in arenas; without, each buffer counts for its lifetime.

    Raises:
        ShapeError: a symbolic size has no value. PlanError: the graphs do not fit each other.
    """
    builder = _Builder()
    state = state or StateBytes()
    holdings = _Holdings(builder, state)
    pending: list[tuple[Graph, FlatGraph, list[int]]] = []
    training = any(graph.phase == "backward" for graph in graphs)
    for graph in graphs:
        flat = flatten(graph, device, bindings, region_buffers)
        if graph.phase == "backward":
            if not pending:
                raise PlanError(
                    f"backward graph {graph.name!r} has no forward before it", remedy="give graphs in order"
                )
            _backward(builder, graph, flat, *pending.pop(), holdings)
        else:
            placed = _forward(builder, graph, flat, holdings)
            if graph.phase == "forward":
                pending.append((graph, flat, placed))
    if training and optimizer:
        _optimizer_step(builder, holdings, optimizer, device)
    if not builder.steps:  # a graph that only hands its inputs through still is one call
        builder.steps.append(Step(id=0, kind="region", name="return", phase="inference"))
    steps, buffers = _finish(builder, device)
    return _assemble(model_name, graphs, device, training, steps, buffers, builder, budget, optimizer, place)


class _Holdings:
    """Parameters, buffers and optimizer state: live from begin to end, matched to the graphs' inputs."""

    def __init__(self, builder: _Builder, state: StateBytes) -> None:
        self.builder = builder
        self.by_name: dict[str, int] = {}
        self.by_bytes: dict[tuple[str, int], list[int]] = {}
        self.gradients: list[int] = []
        self.gradient_modules = {name: module for name, _, module in state.gradients}
        self.taken: set[int] = set()
        self.optimizer = [self._hold("optimizer", entry) for entry in state.optimizer]
        self.parameters = [self._hold("parameter", entry) for entry in state.parameters]
        self.buffers = [self._hold("buffer", entry) for entry in state.buffers]

    def _hold(self, role: str, entry: StateEntry) -> int:
        name, size, module = entry
        identity = self.builder.add(_Memory(name, size, role, lower=0, kept=True, module=module))
        if role != "optimizer":
            self.by_name[_plain(name)] = identity
            self.by_bytes.setdefault((role, size), []).append(identity)
        return identity

    def of_input(self, node: Node, size: int) -> int:
        """The held memory that an input node stands for: by name, else the next unused one of that size, else (where
        the state lists none of that size) memory of its own."""
        named = self.by_name.get(_plain(node.location.module), self.by_name.get(_plain(node.name)))
        if named is not None and self.builder.memory[named].role == node.role:
            self.taken.add(named)
            return named
        alike = self.by_bytes.get((node.role, size), [])
        free = next((identity for identity in alike if identity not in self.taken), None)
        if free is not None:
            self.taken.add(free)
            return free
        if alike:
            return alike[-1]
        module = node.location.module
        identity = self.builder.add(_Memory(module or node.name, size, node.role, lower=0, kept=True, module=module))
        (self.parameters if node.role == "parameter" else self.buffers).append(identity)
        return identity


def _plain(name: str) -> str:
    """A name without what capture adds: ``L__self___layers_0_weight`` and ``layers.0.weight`` are one."""
    for prefix in ("l_self_modules_", "l__self___", "l_self_", "self."):
        if name.lower().startswith(prefix):
            name = name[len(prefix) :]
            break
    name = name.replace("_modules_", ".").replace("_parameters_", ".").replace("_buffers_", ".")
    return name.replace("_", ".").strip(".").lower()


def _forward(builder: _Builder, graph: Graph, flat: FlatGraph, holdings: _Holdings) -> list[int]:
    """Add a forward's steps; returns the memory of each of its pieces."""
    placed = [-1] * len(flat.pieces)
    for node, pieces in zip(graph.inputs, flat.inputs, strict=True):
        for piece in pieces:
            if placed[piece] >= 0:
                continue
            size = flat.pieces[piece].bytes
            if node.role in ("parameter", "buffer"):
                placed[piece] = holdings.of_input(node, size)
            else:
                given = _from_piece(flat, piece, "input", lower=0, kept=True)
                handed = builder.take_handed(given)
                placed[piece] = builder.add(given) if handed is None else handed
    saved = graph.saved if graph.phase == "forward" else 0
    made: list[int] = []
    user = flat.outputs[: len(flat.outputs) - saved]
    for pieces in user:
        for piece in pieces:
            if placed[piece] < 0:
                placed[piece] = builder.add(_from_piece(flat, piece, "output", kept=True))
                made.append(placed[piece])
    for pieces in flat.outputs[len(flat.outputs) - saved :]:
        for piece in pieces:
            if placed[piece] < 0:
                placed[piece] = builder.add(_from_piece(flat, piece, "saved"))
    _run(builder, graph, flat, placed)
    builder.handed += made
    return placed


def _backward(
    builder: _Builder,
    graph: Graph,
    flat: FlatGraph,
    forward: Graph,
    forward_flat: FlatGraph,
    forward_placed: list[int],
    holdings: _Holdings,
) -> None:
    placed = [-1] * len(flat.pieces)
    saved = forward_flat.outputs[len(forward_flat.outputs) - forward.saved :] if forward.saved else []
    kept = [forward_placed[piece] for pieces in saved for piece in pieces]
    taken = [piece for node, ps in zip(graph.inputs, flat.inputs, strict=True) if node.role == "saved" for piece in ps]
    if len(kept) != len(taken):
        raise PlanError(
            f"graph {forward.name!r} saves {len(kept)} tensors and its backward takes {len(taken)}",
            remedy="check Graph.saved of the forward and the roles of the backward's inputs",
        )
    for memory, piece in zip(kept, taken, strict=True):
        placed[piece] = memory
    begin = len(builder.steps)
    results = [forward_placed[p] for ps in forward_flat.outputs[: len(forward.outputs) - forward.saved] for p in ps]
    for pieces in flat.inputs:
        for piece in pieces:
            if placed[piece] < 0:  # gradients of the outputs: given when the backward begins
                tangent = _from_piece(flat, piece, "input", lower=begin)
                like = next((builder.memory[r] for r in results if builder.memory[r].alike(tangent)), None)
                if like is not None:
                    tangent.name = f"gradient({like.name})"
                    tangent.source, tangent.module = like.source, like.module
                of = next((r for r in results if r in builder.gradient_of and builder.memory[r].alike(tangent)), None)
                if of is None:
                    placed[piece] = builder.add(tangent)
                else:  # a later graph's backward made it, and nobody reads it after this one
                    placed[piece] = builder.gradient_of.pop(of)
                    builder.memory[placed[piece]].kept = False
    for node, primal, pieces in zip(forward.inputs, forward_flat.inputs, flat.outputs, strict=False):
        for piece in pieces:
            if placed[piece] >= 0:
                continue
            gradient = _from_piece(flat, piece, "gradient", kept=True)
            gradient.name = f"gradient({node.name})"
            placed[piece] = builder.add(gradient)
            if node.role == "parameter" and primal:
                held = builder.memory[forward_placed[primal[0]]]
                gradient.name, gradient.module = f"gradient({held.name})", held.module or gradient.module
                holdings.gradients.append(placed[piece])
            elif primal:
                builder.gradient_of[forward_placed[primal[0]]] = placed[piece]
    _run(builder, graph, flat, placed)


def _from_piece(flat: FlatGraph, piece: int, role: str, lower: int = -1, kept: bool = False) -> _Memory:
    p = flat.pieces[piece]
    return _Memory(p.name, p.bytes, role, lower, 0, kept, p.dtype, p.shape, p.source, p.module)


def _run(builder: _Builder, graph: Graph, flat: FlatGraph, placed: list[int]) -> None:
    """Append the kernels of a graph as steps, with the memory that only they use."""
    used = {piece for kernel in flat.kernels for piece in (*kernel.reads, *kernel.writes)}
    for piece, entry in enumerate(flat.pieces):
        if placed[piece] < 0 and piece in used:
            placed[piece] = builder.add(_from_piece(flat, piece, "workspace" if entry.internal else "scratch"))
    first = len(builder.steps)
    memory = builder.memory
    for kernel in flat.kernels:
        position = len(builder.steps)
        reads = tuple(dict.fromkeys([placed[piece] for piece in kernel.reads]))
        writes = tuple(dict.fromkeys([placed[piece] for piece in kernel.writes]))
        for identity in (*reads, *writes):
            entry_ = memory[identity]
            if entry_.lower < 0:
                entry_.lower = position
            entry_.upper = position + 1
        builder.steps.append(
            Step(
                id=position,
                kind=kernel.kind,
                name=kernel.name,
                phase=graph.phase,
                reads=reads,
                writes=writes,
                seconds=kernel.cost.seconds,
                flop=kernel.cost.flop,
                bytes_moved=kernel.cost.bytes,
                region=kernel.region,
                ops=kernel.ops,
                source=kernel.source,
                module=kernel.module,
            )
        )
    taken = {plan.name for plan in builder.graphs}
    name = graph.name if graph.name not in taken else f"{graph.name}.{graph.phase}"
    while name in taken:
        name += "'"
    builder.graphs.append(
        GraphPlan(
            name=name,
            graph_hash=graph_hash(graph),
            op_hashes=op_hashes(graph),
            first_step=first,
            last_step=max(first, len(builder.steps) - 1),
        )
    )


def _optimizer_step(builder: _Builder, holdings: _Holdings, optimizer: str, device: Device) -> None:
    """One step that reads gradients, and updates parameters and state."""
    memory = builder.memory
    sizes = [memory[identity].bytes for identity in holdings.parameters]
    held = sum(memory[identity].bytes for identity in holdings.optimizer)
    cost = optimizer_cost(sum(sizes), sum(memory[i].bytes for i in holdings.gradients), held, device)
    position = len(builder.steps)
    workspace = optimizer_workspace(optimizer, sizes, device)
    extra: tuple[int, ...] = ()
    if workspace:
        entry = _Memory(f"{optimizer} temporaries", workspace, "workspace", position, position + 1)
        extra = (builder.add(entry),)
    builder.steps.append(
        Step(
            id=position,
            kind="optimizer",
            name=optimizer,
            phase="optimizer",
            reads=(*holdings.parameters, *holdings.gradients, *holdings.optimizer),
            writes=(*holdings.parameters, *holdings.optimizer, *extra),
            seconds=cost.seconds,
            flop=cost.flop,
            bytes_moved=cost.bytes,
        )
    )


def _finish(builder: _Builder, device: Device) -> tuple[tuple[Step, ...], list[Buffer]]:
    """Close lifetimes and say at which step each buffer is freed."""
    count = len(builder.steps)
    buffers: list[Buffer] = []
    frees: list[list[int]] = [[] for _ in range(count)]
    for identity, entry in enumerate(builder.memory):
        lower = max(entry.lower, 0)
        upper = count if entry.kept else max(entry.upper, min(lower + 1, count))
        if lower >= upper:  # handed to a backward that has no step
            continue
        if not entry.kept:
            frees[upper - 1].append(identity)
        buffers.append(
            Buffer(
                id=identity,
                name=entry.name,
                bytes=entry.bytes,
                lower=lower,
                upper=upper,
                role=entry.role,
                alignment=device.alignment,
                pool=PLACED_ROLES.get(entry.role, ""),
                source=entry.source,
                module=entry.module,
                dtype=entry.dtype,
                shape=entry.shape,
            )
        )
    timeline = simulate(builder.steps)
    steps = tuple(
        Step(
            id=step.id,
            kind=step.kind,
            name=step.name,
            phase=step.phase,
            stream=step.stream,
            reads=step.reads,
            writes=step.writes,
            frees=tuple(freed),
            depends=step.depends,
            start=start,
            seconds=step.seconds,
            flop=step.flop,
            bytes_moved=step.bytes_moved,
            region=step.region,
            ops=step.ops,
            source=step.source,
            module=step.module,
            device=step.device,
            rendezvous=step.rendezvous,
        )
        for step, start, freed in zip(builder.steps, timeline.start, frees, strict=True)
    )
    return steps, buffers


def _assemble(
    model_name: str,
    graphs: Sequence[Graph],
    device: Device,
    training: bool,
    steps: tuple[Step, ...],
    buffers: list[Buffer],
    builder: _Builder,
    budget: int | None,
    optimizer: str,
    place: bool,
) -> Plan:
    solvers: tuple[Solver, ...] = ()
    arena: dict[str, int] = {}
    if place:
        from .memory_mapping import map_memory

        placed, arena, solvers = map_memory([buffer for buffer in buffers if buffer.pool])
        buffers = sorted([*placed, *(buffer for buffer in buffers if not buffer.pool)], key=lambda buffer: buffer.id)
    peak = {
        tier: reserved.peak for tier in TIERS if (reserved := reserved_bytes(buffers, arena, len(steps), tier)).peak > 0
    }
    makespan = max((step.start + step.seconds for step in steps), default=0.0)
    notes: tuple[str, ...] = ()
    if budget is not None and peak.get("device", 0) > budget:
        notes = (f"the peak of {peak['device']} bytes is above the budget of {budget} bytes",)
        budget = None
    dtypes = [
        n.type.dtype for g in graphs for n in g.inputs if n.role == "parameter" and isinstance(n.type, TensorType)
    ]
    return Plan(
        model=model_name,
        device=device.name,
        training=training,
        graphs=tuple(builder.graphs),
        steps=steps,
        buffers=tuple(buffers),
        seconds=makespan,
        peak=peak,
        arena=arena,
        budget=budget,
        solvers=solvers,
        dtype=max(set(dtypes), key=lambda name: (dtypes.count(name), name)) if dtypes else "",
        optimizer=optimizer if training else "",
        notes=notes,
        inputs=_input_specs(graphs),
    )


def _input_specs(graphs: Sequence[Graph]) -> tuple[InputSpec, ...]:
    """What the user calls the first graph with."""
    first = next((graph for graph in graphs if graph.phase != "backward"), None)
    if first is None:
        return ()
    return tuple(
        InputSpec(name=node.name, dtype=node.type.dtype, shape=tuple(str(size) for size in node.type.shape))
        for node in first.inputs
        if node.role in ("input", "") and isinstance(node.type, TensorType)
    )
