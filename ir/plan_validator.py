"""Independent check of plans: it believes nothing that the planner or the solver says.

It shares no code with them (imports only the plan's data model), recomputes liveness, order and peaks from the steps
and buffers alone, and names what is wrong. Cost: O(n log n) for n buffers and steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from ..errors import PlanError
from .overlaps import Piece, overlaps
from .plan import BUFFER_ROLES, STEP_KINDS, TIERS, Buffer, Plan

#: Roles whose contents exist before the first step. A gradient may be carried over from an earlier step (accumulation).
GIVEN_ROLES = frozenset({"parameter", "gradient", "optimizer", "buffer", "input"})
DECISIONS = frozenset({"keep", "recompute", "swap"})
_SHOWN = 10
#: Predicted times are sums of floats; differences below this share of the total are rounding.
_TIME_TOLERANCE = 1e-9


def validate(plan: Plan) -> None:
    """Raise PlanError with the first problems found, if there are any."""
    found = problems(plan)
    if found:
        more = f"\n  ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        listed = "\n".join(f"  - {line}" for line in found[:_SHOWN])
        raise PlanError(
            f"the plan breaks {len(found)} rule(s):\n{listed}{more}",
            where=f"plan of {plan.model} for {plan.device}",
            remedy="do not run it; make the plan again",
        )


def problems(plan: Plan) -> list[str]:
    """Everything that is wrong with the plan, one line each; empty for a sound plan."""
    found = [*_scalar_problems(plan), *_step_problems(plan), *_buffer_problems(plan), *_graph_problems(plan)]
    if found:
        # Order and liveness are only defined where ids are unique and positions are in range.
        return found
    found.extend(_dependency_problems(plan))
    found.extend(_time_problems(plan))
    found.extend(_use_problems(plan))
    found.extend(_arena_problems(plan))
    found.extend(_peak_problems(plan))
    return found


# --- plan: fields


def _number(value: float, what: str) -> Iterable[str]:
    if not math.isfinite(value) or value < 0:
        yield f"{what} is {value}, which is not a finite number of at least 0"


def _scalar_problems(plan: Plan) -> Iterable[str]:
    yield from _number(plan.seconds, "plan.seconds")
    for tier, size in plan.peak.items():
        if tier not in TIERS:
            yield f"plan.peak names the unknown tier {tier!r}"
        yield from _number(size, f"plan.peak[{tier!r}]")
    for key, size in plan.arena.items():
        if key.split("/", 1)[0] not in TIERS:
            yield f"plan.arena names the unknown tier {key!r}"
        yield from _number(size, f"plan.arena[{key!r}]")
    if plan.budget is not None:
        yield from _number(plan.budget, "plan.budget")
        if plan.peak.get("device", 0) > plan.budget:
            yield f"peak {plan.peak['device']} bytes on the device is above the budget of {plan.budget} bytes"
    for solver in plan.solvers:
        for field in ("value", "bound", "seconds"):
            if not math.isfinite(getattr(solver, field)):
                yield f"solver {solver.name!r}: {field} is {getattr(solver, field)}"


def _step_problems(plan: Plan) -> Iterable[str]:
    seen: set[int] = set()
    for step in plan.steps:
        label = f"step {step.id} ({step.name!r})"
        if step.id in seen:
            yield f"{label}: the id is used twice"
        seen.add(step.id)
        if step.kind not in STEP_KINDS:
            yield f"{label}: unknown kind {step.kind!r}"
        for field in ("start", "seconds", "flop", "bytes_moved"):
            yield from _number(getattr(step, field), f"{label}: {field}")


def _buffer_problems(plan: Plan) -> Iterable[str]:
    seen: set[int] = set()
    for buffer in plan.buffers:
        label = _label(buffer)
        if buffer.id in seen:
            yield f"{label}: the id is used twice"
        seen.add(buffer.id)
        yield from _number(buffer.bytes, f"{label}: bytes")
        if not 0 <= buffer.lower < buffer.upper <= len(plan.steps):
            yield f"{label}: lifetime [{buffer.lower}, {buffer.upper}) is not within the plan's {len(plan.steps)} steps"
        if buffer.tier not in TIERS:
            yield f"{label}: unknown tier {buffer.tier!r}"
        if buffer.role not in BUFFER_ROLES:
            yield f"{label}: unknown role {buffer.role!r}"
        if buffer.decision not in DECISIONS:
            yield f"{label}: unknown decision {buffer.decision!r}"
        if buffer.alignment < 1:
            yield f"{label}: alignment {buffer.alignment} is not at least 1"
        if any(size < 0 for size in buffer.shape):
            yield f"{label}: negative size in shape {buffer.shape}"
    known = seen
    for step in plan.steps:
        for field in ("reads", "writes", "frees"):
            for identity in getattr(step, field):
                if identity not in known:
                    yield f"step {step.id} ({step.name!r}): {field} the unknown buffer {identity}"


def _graph_problems(plan: Plan) -> Iterable[str]:
    names: set[str] = set()
    for graph in plan.graphs:
        if graph.name in names:
            yield f"graph {graph.name!r} is listed twice"
        names.add(graph.name)
        if not 0 <= graph.first_step <= graph.last_step <= len(plan.steps):
            yield f"graph {graph.name!r}: steps {graph.first_step}..{graph.last_step} of {len(plan.steps)}"


# --- plan: order and use


def _dependency_problems(plan: Plan) -> Iterable[str]:
    position_of = {step.id: position for position, step in enumerate(plan.steps)}
    timed = any(step.start > 0 for step in plan.steps)
    slack = _TIME_TOLERANCE * max(plan.seconds, 1.0)
    for position, step in enumerate(plan.steps):
        for dependency in step.depends:
            label = f"step {step.id} ({step.name!r})"
            earlier = position_of.get(dependency)
            if earlier is None:
                yield f"{label} depends on the unknown step {dependency}"
            elif earlier >= position:
                yield f"{label} depends on step {dependency}, which does not come before it"
            elif timed:
                other = plan.steps[earlier]
                if step.start + slack < other.start + other.seconds:
                    yield f"{label} starts at {step.start} s, before step {dependency}, which it depends on, has ended"


def _time_problems(plan: Plan) -> Iterable[str]:
    """Steps of one stream follow each other, and the plan's length is the end of its last step."""
    slack = _TIME_TOLERANCE * max(plan.seconds, 1.0)
    if any(step.start > 0 for step in plan.steps):
        ends: dict[tuple[int, str], tuple[float, int]] = {}
        for step in plan.steps:
            own = (step.device, step.stream)
            until, before = ends.get(own, (0.0, -1))
            if step.start + slack < until:
                yield (
                    f"step {step.id} ({step.name!r}) starts at {step.start} s on stream {step.stream!r}, "
                    f"before step {before} there has ended"
                )
            ends[own] = (max(until, step.start + step.seconds), step.id)
    last = max((step.start + step.seconds for step in plan.steps), default=0.0)
    if abs(last - plan.seconds) > slack:
        yield f"the plan claims {plan.seconds} s; its last step ends at {last} s"


def _use_problems(plan: Plan) -> Iterable[str]:
    """Reads, writes and frees in issue order, with what each stream knows to be finished of the others."""
    by_id = {buffer.id: buffer for buffer in plan.buffers}
    position_of = {step.id: position for position, step in enumerate(plan.steps)}
    written: dict[int, int] = {}
    freed: dict[int, int] = {}
    # finished[p][stream]: last position of that stream that is known to have ended before step p begins.
    finished: list[dict[tuple[int, str], int]] = []
    last_of_stream: dict[tuple[int, str], int] = {}
    for position, step in enumerate(plan.steps):
        label = f"step {step.id} ({step.name!r})"
        clock: dict[tuple[int, str], int] = {}
        own = (step.device, step.stream)
        before = [position_of[dependency] for dependency in step.depends if dependency in position_of]
        if own in last_of_stream:
            before.append(last_of_stream[own])
        for earlier in before:
            if earlier < position:
                other = (plan.steps[earlier].device, plan.steps[earlier].stream)
                for stream, reached in (*finished[earlier].items(), (other, earlier)):
                    clock[stream] = max(clock.get(stream, -1), reached)
        finished.append(clock)
        last_of_stream[own] = position
        for identity in (*step.reads, *step.writes):
            buffer = by_id[identity]
            if identity in freed:
                yield f"{label} uses {_label(buffer)} after step {plan.steps[freed[identity]].id} freed it"
            elif not buffer.lower <= position < buffer.upper:
                yield f"{label} at position {position} uses {_label(buffer)} outside [{buffer.lower}, {buffer.upper})"
        for identity in step.reads:
            buffer = by_id[identity]
            if identity in written:
                writer = plan.steps[written[identity]]
                theirs = (writer.device, writer.stream)
                if theirs != own and clock.get(theirs, -1) < written[identity]:
                    yield (
                        f"{label} on stream {step.stream!r} reads {_label(buffer)} without waiting for "
                        f"step {writer.id} on stream {writer.stream!r}, which writes it"
                    )
            elif buffer.role not in GIVEN_ROLES:
                yield f"{label} reads {_label(buffer)} before any step has written it"
        for identity in step.writes:
            written[identity] = position
        for identity in step.frees:
            if identity in freed:
                yield f"{label} frees {_label(by_id[identity])} a second time"
            elif identity not in written and by_id[identity].role not in GIVEN_ROLES:
                yield f"{label} frees {_label(by_id[identity])}, which no step has made"
            freed[identity] = position


# --- plan: addresses


def _arena_problems(plan: Plan) -> Iterable[str]:
    arenas: dict[str, list[Piece]] = defaultdict(list)
    for buffer in plan.buffers:
        if buffer.offset is None:
            continue
        key = f"{buffer.tier}/{buffer.pool}" if buffer.pool else buffer.tier
        label = _label(buffer)
        if key not in plan.arena:
            yield f"{label} is placed in {key!r}, for which the plan has no arena"
        elif buffer.offset + buffer.bytes > plan.arena[key]:
            yield (
                f"{label}: offset {buffer.offset} + {buffer.bytes} bytes is beyond the {plan.arena[key]} bytes "
                f"of the {key} arena"
            )
        if buffer.offset < 0:
            yield f"{label}: offset {buffer.offset} is negative"
        if buffer.offset % buffer.alignment:
            yield f"{label}: offset {buffer.offset} is not a multiple of its alignment {buffer.alignment}"
        piece = Piece(buffer.lower, buffer.upper, buffer.offset, buffer.offset + buffer.bytes, label)
        arenas[key].append(piece)
    for key, pieces in sorted(arenas.items()):
        for first, second, time in overlaps(pieces):
            yield f"{first} and {second} overlap in the {key} arena at position {time}"


def _peak_problems(plan: Plan) -> Iterable[str]:
    """Recompute the greatest use of each tier: arenas held at a position, plus unplaced buffers live there."""
    change: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    held: dict[str, tuple[int, int]] = {}
    for buffer in plan.buffers:
        if buffer.offset is None:
            change[buffer.tier][buffer.lower] += buffer.bytes
            change[buffer.tier][buffer.upper] -= buffer.bytes
        else:
            key = f"{buffer.tier}/{buffer.pool}" if buffer.pool else buffer.tier
            lower, upper = held.get(key, (buffer.lower, buffer.upper))
            held[key] = (min(lower, buffer.lower), max(upper, buffer.upper))
    for key, (lower, upper) in held.items():
        tier = key.split("/", 1)[0]
        change[tier][lower] += plan.arena.get(key, 0)
        change[tier][upper] -= plan.arena.get(key, 0)
    for tier in sorted(set(change) | set(plan.peak)):
        live = highest = where = 0
        for position in sorted(change[tier]):
            live += change[tier][position]
            if live > highest:
                highest, where = live, position
        claimed = plan.peak.get(tier, 0)
        if highest != claimed:
            yield f"the plan claims a peak of {claimed} bytes on {tier}; its buffers need {highest} (position {where})"
        if tier == "device" and plan.budget is not None and claimed <= plan.budget < highest:
            yield f"the buffers need {highest} bytes on the device, above the budget of {plan.budget} bytes"


def _label(buffer: Buffer) -> str:
    return f"buffer {buffer.id} ({buffer.name!r})"
