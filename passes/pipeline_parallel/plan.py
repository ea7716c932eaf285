"""A simulated schedule as a plan, and the schedule of a plan.

The plan's steps are those of the simulator: per rank (``device``) the passes on the compute stream, the sends to each
neighbour, the collectives, with predicted begin and length. Its solver says how far the iteration is from the bound.
"""

from __future__ import annotations

import re
from collections import defaultdict

import msgspec

from ...errors import ScheduleError
from ...ir.plan import GraphPlan, Plan, Solver
from .heuristics import Found
from .schedule import STAGE_KINDS, Pass, Schedule
from .simulate import OUTPUT_BARRIER, OUTPUT_GRADIENT

_PASS = re.compile(r"(\d+)([FBIWSTED])(\d+)")


def to_plan(found: Found, *, model: str, device: str, graph_hash: str = "", held: tuple[int, ...] = ()) -> Plan:
    """The plan of a schedule. ``held``: bytes of each rank besides what microbatches hold, for the notes; the plan's
    own peak is that of all ranks' microbatches together, at positions of the list of steps."""
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
        f"{schedule.ranks} ranks, {schedule.stages} stages, {schedule.microbatches} microbatches: {schedule.name}",
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


def from_plan(plan: Plan) -> Schedule:
    """The schedule that a plan's steps show. Raises ScheduleError for a plan of something else."""
    orders: dict[int, list[Pass]] = defaultdict(list)
    placement: dict[int, int] = {}
    streams = set()
    together = False
    for step in plan.steps:
        streams.add(step.stream)
        match = _PASS.fullmatch(step.name) if step.kind == "region" else None
        if match is None:
            continue
        each = Pass(match[2], int(match[1]), int(match[3]))
        orders[step.device].append(each)
        if each.kind in STAGE_KINDS:
            placement[each.stage] = step.device
        together |= each.kind == "S" and bool(step.rendezvous)
    if not placement or sorted(placement) != list(range(len(placement))):
        raise ScheduleError("the plan is not one of a pipeline", remedy="make it for a mesh with pp")
    kinds = {each.kind for order in orders.values() for each in order}
    vocabulary = ""
    if "S" in kinds:
        split = "two-barriers" if OUTPUT_GRADIENT in streams else "one-barrier" if OUTPUT_BARRIER in streams else ""
        vocabulary = "interlaced" if together else split
    found = Schedule(
        plan.graphs[0].name if plan.graphs else plan.model,
        1 + max(each.microbatch for order in orders.values() for each in order),
        tuple(placement[stage] for stage in sorted(placement)),
        tuple(tuple(orders[rank]) for rank in range(max(orders) + 1)),
        vocabulary,
        "E" in kinds,
    )
    found.check()
    return found
