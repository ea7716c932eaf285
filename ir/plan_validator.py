"""Independent check of plans and memory maps: it believes nothing that the planner or the solver says.

It shares no code with them (imports only the plan's data model), recomputes liveness, order and peaks from the steps
and buffers alone, and names what is wrong. Cost: O(n log n) for n buffers and steps.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..errors import PlanError
from .plan import BUFFER_ROLES, STEP_KINDS, TIERS, Buffer, Plan

#: Roles whose contents exist before the first step. A gradient may be carried over from an earlier step (accumulation).
GIVEN_ROLES = frozenset({"parameter", "gradient", "optimizer", "buffer", "input"})
DECISIONS = frozenset({"keep", "recompute", "swap"})
_SHOWN = 10
#: Predicted times are sums of floats; differences below this share of the total are rounding.
_TIME_TOLERANCE = 1e-9


class Piece(NamedTuple):
    """A rectangle: addresses ``low <= a < high`` in use at times ``lower <= t < upper``; ``owner`` names it."""

    lower: int
    upper: int
    low: int
    high: int
    owner: str


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
    found.extend(_use_problems(plan))
    found.extend(_arena_problems(plan))
    found.extend(_peak_problems(plan))
    return found


def match_graph(
    plan: Plan, op_hashes: Mapping[str, Sequence[str]], names: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Check that captured graphs are the ones the plan was made for.

    Args:
        op_hashes: for each captured graph's name its structural hashes, one per op, in order.
        names: for each graph the ops' names (with their source lines, if wanted), used in the error.

    Raises:
        PlanError: naming the first graph and op that differ.
    """
    remedy = "make the plan again for this model, or load the model that the plan was made for"
    for index, graph in enumerate(plan.graphs):
        if graph.name not in op_hashes:
            captured = ", ".join(op_hashes) or "none"
            raise PlanError(f"the plan's graph {graph.name!r} was not captured (captured: {captured})", remedy=remedy)
        hashes = op_hashes[graph.name]
        for position, (planned, found) in enumerate(zip(graph.op_hashes, hashes, strict=False)):
            if planned != found:
                label = _op_label(graph.name, position, names)
                raise PlanError(
                    f"graph {index} ({graph.name!r}) differs from the plan's first at {label}", remedy=remedy
                )
        if len(graph.op_hashes) != len(hashes):
            shorter = min(len(graph.op_hashes), len(hashes))
            label = _op_label(graph.name, shorter, names)
            raise PlanError(
                f"graph {index} ({graph.name!r}) has {len(hashes)} ops and the plan's has {len(graph.op_hashes)}; "
                f"the first that differs is {label}",
                remedy=remedy,
            )
    extra = sorted(set(op_hashes) - {graph.name for graph in plan.graphs})
    if extra:
        raise PlanError(f"captured graph {extra[0]!r} is not in the plan", remedy=remedy)


def _op_label(graph: str, position: int, names: Mapping[str, Sequence[str]] | None) -> str:
    known = (names or {}).get(graph, ())
    return f"op {position} ({known[position]})" if position < len(known) else f"op {position}"


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


def _use_problems(plan: Plan) -> Iterable[str]:
    """Reads, writes and frees in issue order, with what each stream knows to be finished of the others."""
    by_id = {buffer.id: buffer for buffer in plan.buffers}
    position_of = {step.id: position for position, step in enumerate(plan.steps)}
    written: dict[int, int] = {}
    freed: dict[int, int] = {}
    # finished[p][stream]: last position of that stream that is known to have ended before step p begins.
    finished: list[dict[str, int]] = []
    last_of_stream: dict[str, int] = {}
    for position, step in enumerate(plan.steps):
        label = f"step {step.id} ({step.name!r})"
        clock: dict[str, int] = {}
        before = [position_of[dependency] for dependency in step.depends if dependency in position_of]
        if step.stream in last_of_stream:
            before.append(last_of_stream[step.stream])
        for earlier in before:
            if earlier < position:
                for stream, reached in (*finished[earlier].items(), (plan.steps[earlier].stream, earlier)):
                    clock[stream] = max(clock.get(stream, -1), reached)
        finished.append(clock)
        last_of_stream[step.stream] = position
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
                if writer.stream != step.stream and clock.get(writer.stream, -1) < written[identity]:
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


def overlaps(pieces: Sequence[Piece]) -> list[tuple[str, str, int]]:
    """Pairs of rectangles of different owners that share an address at one time: ``(owner, owner, time)``.

    Sweep line over time; live rectangles are kept sorted by address and disjoint, so that a new one needs comparing
    with its two neighbours only; one that clashes is reported and left out. Empty if and only if there is no overlap.
    """
    found: list[tuple[str, str, int]] = []
    # At one time ends come before starts: lifetimes are half-open.
    events = sorted(
        event
        for index, piece in enumerate(pieces)
        if piece.low < piece.high and piece.lower < piece.upper
        for event in ((piece.upper, 0, index), (piece.lower, 1, index))
    )
    live: list[tuple[int, int, int]] = []
    ignored: set[int] = set()
    for time, starts, index in events:
        piece = pieces[index]
        entry = (piece.low, piece.high, index)
        place = bisect.bisect_left(live, entry)
        if not starts:
            if index in ignored:
                ignored.discard(index)
            else:
                del live[place]
            continue
        clash = None
        if place > 0 and live[place - 1][1] > piece.low:
            clash = live[place - 1][2]
        elif place < len(live) and live[place][0] < piece.high:
            clash = live[place][2]
        if clash is None:
            live.insert(place, entry)
            continue
        ignored.add(index)
        found.append((pieces[clash].owner, piece.owner, time))
    return found


# --- memory maps


def validate_mapping(rows: Sequence[Mapping[str, str]], capacity: int | None = None) -> None:
    """Check a solved memory map as read by ``csv.DictReader``: columns id, lower, upper, size, offset and, where there,
    alignment and gaps (``3-7`` free, or ``3-7@0:128`` only the first 128 bytes in use), all half-open.

    Raises:
        PlanError: naming the rows that are wrong.
    """
    found: list[str] = []
    pieces: list[Piece] = []
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        name = row["id"]
        if name in seen:
            found.append(f"line {number}: id {name!r} is used twice")
        seen.add(name)
        try:
            lower, upper, size, offset = (int(row[column]) for column in ("lower", "upper", "size", "offset"))
            alignment = int(row.get("alignment") or 1)
            gaps = _gaps(row.get("gaps") or "", size)
        except (ValueError, KeyError) as error:
            found.append(f"line {number}: {error}")
            continue
        if offset < 0 or (alignment > 1 and offset % alignment):
            found.append(f"line {number}: buffer {name!r} has offset {offset} with alignment {alignment}")
        if capacity is not None and offset + size > capacity:
            found.append(f"line {number}: buffer {name!r} ends at {offset + size}, above the capacity of {capacity}")
        time = lower
        for begin, end, low, high in [*gaps, (upper, upper, 0, 0)]:
            pieces.append(Piece(time, begin, offset, offset + size, name))
            pieces.append(Piece(begin, end, offset + low, offset + high, name))
            time = end
    for first, second, time in overlaps(pieces):
        found.append(f"buffers {first!r} and {second!r} overlap at time {time}")
    if found:
        more = f"\n  ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise PlanError("the memory map is wrong:\n" + "\n".join(f"  - {line}" for line in found[:_SHOWN]) + more)


def _gaps(text: str, size: int) -> list[tuple[int, int, int, int]]:
    """Gaps in order of time: begin, end, and the part of the buffer that stays in use (empty unless given)."""
    gaps = []
    for word in text.split():
        lifetime, _, window = word.partition("@")
        begin, _, end = lifetime.partition("-")
        low, _, high = window.partition(":") if window else ("0", "", "0")
        gaps.append((int(begin), int(end), int(low), int(high)))
    if any(not (begin <= end and 0 <= low <= high <= size) for begin, end, low, high in gaps):
        raise ValueError(f"gap out of range in {text!r}")
    return sorted(gaps)


def _label(buffer: Buffer) -> str:
    return f"buffer {buffer.id} ({buffer.name!r})"
