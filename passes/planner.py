"""Make the plan of a model from its captured graphs: steps in a fixed order, buffers with lifetimes, time and peak.

The timeline is one training step (forward, backward, optimizer) or one inference call. Each kernel of a region is one
step, so that a position of the timeline is a moment at which memory can be counted exactly; the steps of one region
share ``Step.region``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..cost_model.devices import Device
from ..cost_model.liveness import reserved_bytes
from ..cost_model.optimizers import optimizer_cost, optimizer_workspace
from ..cost_model.outside_loss import HELD, LOSS_BYTES, NAME, outside_loss_bytes
from ..cost_model.region_memory import KernelOrder
from ..cost_model.tensors import Bindings
from ..errors import PlanError
from ..ir.graph import Graph
from ..ir.plan import TIERS, Alternative, Buffer, Decision, GraphPlan, InputSpec, Plan, Solver, Step
from ..ir.structural_hash import graph_hash, op_hashes
from ..ir.types import TensorType
from .flatten import FlatGraph, RegionBuffers, flatten
from .plan_builder import Holdings, Memory, PlanBuilder, StateBytes, close_plan

__all__ = ["StateBytes", "make_plan"]


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
    outside_loss: bool = False,
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
        outside_loss: whether a step stands for what the caller's loss holds between the last forward and the first
            backward (see ``cost_model.outside_loss``).
        place: whether saved and scratch memory get offsets in arenas; without, each buffer counts for its lifetime.

    Raises:
        ShapeError: a symbolic size has no value. PlanError: the graphs do not fit each other.
    """
    builder = PlanBuilder(
        graph_call=device.graph_call.value if device.graph_call is not None else 0.0,
        parameter_call=device.parameter_call.value if device.parameter_call is not None else 0.0,
    )
    state = state or StateBytes()
    holdings = Holdings(builder, state)
    pending: list[tuple[Graph, FlatGraph, list[int]]] = []
    training = any(graph.phase == "backward" for graph in graphs)
    for graph in graphs:
        flat = flatten(graph, device, bindings, region_buffers)
        builder.orders.update(flat.orders)
        if graph.phase == "backward":
            if not pending:
                raise PlanError(
                    f"backward graph {graph.name!r} has no forward before it", remedy="give graphs in order"
                )
            before = pending.pop()
            if outside_loss and not any(step.phase == "loss" for step in builder.steps):
                _loss_step(builder, graph, before[0], bindings)
            _backward(builder, graph, flat, *before, holdings)
        else:
            placed = _forward(builder, graph, flat, holdings)
            if graph.phase == "forward":
                pending.append((graph, flat, placed))
    if training and optimizer:
        _optimizer_step(builder, holdings, optimizer, device)
    if not builder.steps:  # a graph that only hands its inputs through still is one call
        builder.steps.append(Step(id=0, kind="region", name="return", phase="inference"))
    steps, buffers = close_plan(builder, device)
    return _assemble(model_name, graphs, device, training, steps, buffers, builder, budget, optimizer, place)


def _forward(builder: PlanBuilder, graph: Graph, flat: FlatGraph, holdings: Holdings) -> list[int]:
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


def _loss_step(builder: PlanBuilder, backward: Graph, forward: Graph, bindings: Bindings | None) -> None:
    """A step for the loss that the caller computes of the outputs, and for its gradient. It is not ours, and takes none
    of the step's time; its memory is held meanwhile."""
    tangents = [node for node in backward.inputs if node.role != "saved"]
    size = outside_loss_bytes(forward, len(forward.outputs) - forward.saved, tangents, bindings)
    if size:
        position = len(builder.steps)
        held = builder.add(Memory(NAME, size, "workspace", position, position + 1))
        loss = builder.add(Memory(HELD, LOSS_BYTES, "output", position, kept=True))
        builder.steps.append(Step(id=position, kind="outside", name=NAME, phase="loss", writes=(held, loss)))


def _backward(
    builder: PlanBuilder,
    graph: Graph,
    flat: FlatGraph,
    forward: Graph,
    forward_flat: FlatGraph,
    forward_placed: list[int],
    holdings: Holdings,
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
    if begin and builder.steps[-1].phase == "loss":
        begin -= 1  # which makes the gradients of the outputs
    results = [forward_placed[p] for ps in forward_flat.outputs[: len(forward.outputs) - forward.saved] for p in ps]
    roots: list[int] = []  # gradients of scalar losses, which ``Tensor.backward`` holds until it ends
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
                    if math.prod(tangent.shape) == 1:
                        roots.append(placed[piece])
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
    for identity in roots:
        builder.memory[identity].upper = len(builder.steps)


def _from_piece(flat: FlatGraph, piece: int, role: str, lower: int = -1, kept: bool = False) -> Memory:
    p = flat.pieces[piece]
    return Memory(p.name, p.bytes, role, lower, 0, kept, p.dtype, p.shape, p.source, p.module)


def _run(builder: PlanBuilder, graph: Graph, flat: FlatGraph, placed: list[int]) -> None:
    """Append the kernels of a graph as steps, with the memory that only they use."""
    used = {piece for kernel in flat.kernels for piece in (*kernel.reads, *kernel.writes)}
    for piece, entry in enumerate(flat.pieces):
        if placed[piece] < 0 and piece in used:
            placed[piece] = builder.add(_from_piece(flat, piece, "workspace" if entry.internal else "scratch"))
    first = len(builder.steps)
    memory = builder.memory
    for number, kernel in enumerate(flat.kernels):
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
                seconds=kernel.cost.seconds + (0.0 if number else builder.call_seconds(graph)),
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


def _optimizer_step(builder: PlanBuilder, holdings: Holdings, optimizer: str, device: Device) -> None:
    """One step that reads gradients, and updates parameters and state."""
    memory = builder.memory
    sizes = [memory[identity].bytes for identity in holdings.parameters]
    held = sum(memory[identity].bytes for identity in holdings.optimizer)
    cost = optimizer_cost(sum(sizes), sum(memory[i].bytes for i in holdings.gradients), held, device)
    position = len(builder.steps)
    workspace = optimizer_workspace(optimizer, sizes, device)
    extra: tuple[int, ...] = ()
    if workspace:
        entry = Memory(f"{optimizer} temporaries", workspace, "workspace", position, position + 1)
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


def _assemble(
    model_name: str,
    graphs: Sequence[Graph],
    device: Device,
    training: bool,
    steps: tuple[Step, ...],
    buffers: list[Buffer],
    builder: PlanBuilder,
    budget: int | None,
    optimizer: str,
    place: bool,
) -> Plan:
    buffers, arena, solvers, peak = _placed(buffers, len(steps)) if place else (buffers, {}, (), None)
    peak = peak or _peaks(buffers, {}, len(steps))
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
        decisions=tuple(itertools.starmap(order_decision, builder.orders.items())),
        dtype=max(set(dtypes), key=lambda name: (dtypes.count(name), name)) if dtypes else "",
        optimizer=optimizer if training else "",
        notes=notes,
        inputs=_input_specs(graphs),
    )


def order_decision(region: str, order: KernelOrder) -> Decision:
    """The order of a region's kernels as a decision."""
    ways = ((order.otherwise, order.given), ("least memory", order.peak))
    return Decision(
        kind="kernel order",
        subject=f"{order.kernels} kernels of {region}",
        chosen=ways[1 if order.peak < order.given else 0][0],
        alternatives=tuple(Alternative(what=what, value=value) for what, value in dict(ways).items()),
        unit="bytes",
        bound=order.bound,
    )


#: By how much arenas may raise the peak of the step, as a share of it.
SLACK = 0.005


def _placed(
    buffers: list[Buffer], length: int
) -> tuple[list[Buffer], dict[str, int], tuple[Solver, ...], dict[str, int]]:
    """Buffers with offsets in arenas, as far as arenas are free of charge: one is held in full while any of its buffers
    lives, so where other memory grows meanwhile, buffers that are allocated one by one have the lower peak."""
    from .memory_mapping import map_memory

    alone = _peaks(buffers, {}, length)
    pools = sorted({buffer.pool for buffer in buffers if buffer.pool})
    for chosen in (pools, *([pool] for pool in pools if len(pools) > 1)):
        placed, arena, solvers = map_memory([buffer for buffer in buffers if buffer.pool in chosen])
        rest = [buffer for buffer in buffers if buffer.pool not in chosen]
        together = sorted([*placed, *rest], key=lambda buffer: buffer.id)
        peak = _peaks(together, arena, length)
        if all(peak[tier] <= alone.get(tier, 0) * (1 + SLACK) for tier in peak):
            return together, arena, solvers, peak
    return buffers, {}, (), alone


def _peaks(buffers: list[Buffer], arena: dict[str, int], length: int) -> dict[str, int]:
    return {
        tier: reserved.peak for tier in TIERS if (reserved := reserved_bytes(buffers, arena, length, tier)).peak > 0
    }


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
