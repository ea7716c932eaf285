"""A simulated schedule as a plan, and the schedule of a plan.

The plan's steps are those of the simulator: per rank (``device``) the passes on the compute stream, the sends to each
neighbour, the collectives, with predicted begin and length. Its solver says how far the iteration is from the bound.
With replicas, rank p of replica d is device ``p * replicas + d``, as in a mesh with axes (pp, dp).
"""

from __future__ import annotations

import re
from collections import defaultdict

import msgspec

from ...errors import ScheduleError
from ...ir.plan import Buffer, GraphPlan, Plan, Solver, Step
from .heuristics import Found
from .schedule import STAGE_KINDS, Pass, Schedule
from .simulate import OUTPUT_BARRIER, OUTPUT_GRADIENT, REPLICAS

#: How the note with the mesh begins.
_MESH = "mesh: "
_PASS = re.compile(r"(\d+)([FBIWSTED])(\d+)")


def to_plan(
    found: Found, *, model: str, device: str, graph_hash: str = "", held: tuple[int, ...] = (), replicas: int = 1,
    mesh: str = "",
) -> Plan:  # fmt: skip
    """The plan of a schedule, for ``mesh`` (kept in the notes, see ``mesh_of``). ``held``: bytes of each rank besides
    what microbatches hold, for the notes; the plan's own peak is that of all ranks' microbatches together, at positions
    of the list of steps."""
    run, schedule = found.run, found.schedule
    steps = tuple(
        msgspec.structs.replace(step, start=run.timeline.start[index]) for index, step in enumerate(run.steps)
    )
    buffers = tuple(buffer for buffer in run.buffers if buffer.bytes)
    kept = {buffer.id for buffer in buffers}
    steps = tuple(
        msgspec.structs.replace(
            step,
            writes=tuple(each for each in step.writes if each in kept),
            frees=tuple(each for each in step.frees if each in kept),
        )
        for step in steps
    )
    steps, buffers = _replicated(steps, buffers, replicas)
    change: dict[int, int] = defaultdict(int)
    for buffer in buffers:
        change[buffer.lower] += buffer.bytes
        change[buffer.upper] -= buffer.bytes
    live = most = 0
    for position in sorted(change):
        live += change[position]
        most = max(most, live)
    memory = ", ".join(str(peak) for peak in run.peak)
    notes = (
        f"{schedule.ranks} ranks, {schedule.stages} stages, {schedule.microbatches} microbatches: {schedule.name}"
        + (f", {replicas} replicas" if replicas > 1 else ""),
        *((f"{_MESH}{mesh}",) if mesh else ()),
        f"bubble {100 * run.bubble:.1f} %; bytes on each rank: {memory}" + (f"; of these held: {held}" if held else ""),
    )
    return Plan(
        model=model,
        device=device,
        training=True,
        graphs=(GraphPlan(name=schedule.name, graph_hash=graph_hash, last_step=len(steps) - 1),),
        steps=steps,
        buffers=buffers,
        seconds=run.seconds,
        peak={"device": most} if most else {},
        arena={},
        solvers=(Solver(name="pipeline", problem="pipeline schedule", value=run.seconds, bound=found.bound),),
        notes=notes,
    )


def _replicated(
    steps: tuple[Step, ...], buffers: tuple[Buffer, ...], replicas: int
) -> tuple[tuple[Step, ...], tuple[Buffer, ...]]:
    """The steps of all replicas, one replica after the other; sums over replicas begin together on all."""
    names = 1 + max((buffer.id for buffer in buffers), default=-1)
    all_steps: list[Step] = []
    all_buffers: list[Buffer] = []
    for replica in range(replicas):
        first, name = replica * len(steps), replica * names
        for step in steps:
            meeting = step.rendezvous and f"{step.rendezvous}, replica {replica}"
            if step.stream == REPLICAS or step.kind == "optimizer":
                meeting = step.rendezvous or step.name
            all_steps.append(
                msgspec.structs.replace(
                    step, id=step.id + first, device=step.device * replicas + replica,
                    depends=tuple(each + first for each in step.depends),
                    writes=tuple(each + name for each in step.writes), frees=tuple(each + name for each in step.frees),
                    rendezvous=meeting if replicas > 1 else step.rendezvous,
                )
            )  # fmt: skip
        all_buffers += [
            msgspec.structs.replace(buffer, id=buffer.id + name, lower=buffer.lower + first, upper=buffer.upper + first)
            for buffer in buffers
        ]
    return tuple(all_steps), tuple(all_buffers)


def replicas_of(plan: Plan) -> int:
    """How many replicas of its pipeline a plan has."""
    orders = _orders(plan)
    return sum(order[0] == orders[0][0] for order in orders.values()) if 0 in orders else 1


def mesh_of(plan: Plan) -> str:
    """The mesh that a plan was made for, with what was chosen for it: ``pp=2,cp=4,context=ring``. Empty for a plan
    without axes besides pp and dp."""
    return next((note.removeprefix(_MESH) for note in plan.notes if note.startswith(_MESH)), "")


def from_plan(plan: Plan) -> Schedule:
    """The schedule that a plan's steps show, that of one replica. Raises ScheduleError for a plan of something else."""
    orders, replicas = _orders(plan), replicas_of(plan)
    placement = {
        each.stage: device // replicas for device, order in orders.items() for each in order if each.kind in STAGE_KINDS
    }
    if not placement or sorted(placement) != list(range(len(placement))):
        raise ScheduleError("the plan is not one of a pipeline", remedy="make it for a mesh with pp")
    devices = range(0, 1 + max(orders), replicas)
    if any(orders.get(device) != orders.get(device + other) for device in devices for other in range(replicas)):
        raise ScheduleError("the replicas of the plan's pipeline differ", remedy="make the plan anew")
    kinds = {each.kind for order in orders.values() for each in order}
    vocabulary = ""
    if "S" in kinds:
        streams = {step.stream for step in plan.steps}
        passes = (step for step in plan.steps if step.kind == "region" and _PASS.fullmatch(step.name))
        together = any("S" in step.name and step.rendezvous for step in passes)
        split = "two-barriers" if OUTPUT_GRADIENT in streams else "one-barrier" if OUTPUT_BARRIER in streams else ""
        vocabulary = "interlaced" if together else split
    found = Schedule(
        plan.graphs[0].name if plan.graphs else plan.model,
        1 + max(each.microbatch for order in orders.values() for each in order),
        tuple(placement[stage] for stage in sorted(placement)),
        tuple(tuple(orders.get(device, ())) for device in devices),
        vocabulary,
        "E" in kinds,
    )
    found.check()
    return found


def _orders(plan: Plan) -> dict[int, list[Pass]]:
    """What each device runs."""
    orders: dict[int, list[Pass]] = defaultdict(list)
    for step in plan.steps:
        match = _PASS.fullmatch(step.name) if step.kind == "region" else None
        if match is not None:
            orders[step.device].append(Pass(match[2], int(match[1]), int(match[3])))
    return dict(orders)
