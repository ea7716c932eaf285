"""The order of a plan's kernels, and which of them run at once, on streams of their own: one choice.

Steps that need nothing of each other may run together: each begins when all before them have ended, and what comes next
waits for all. A later step is brought forward to an earlier one if it needs nothing of what lies between. While they
run, each takes as much of the device as it takes alone, so small kernels overlap and large ones gain only their
launches. Which sets of steps run together, and so the order, is chosen by ``cost_model.schedule_model``, within the
peak that the plan has anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from .cost_model.devices import Device
from .cost_model.liveness import reserved_bytes
from .cost_model.schedule_model import Choice, ScheduleProblem, Span, Way, choose_ways
from .cost_model.simulator import simulate
from .cost_model.step_bounds import needs
from .ir.plan import Alternative, Buffer, Decision, Plan, Step

#: The stream that steps are on if nothing is decided.
MAIN = "compute"
#: Most of them: a GPU works on more at once, but a set of so many steps that need nothing of each other is rare.
MOST_STREAMS = 8
#: Steps that a later one is brought forward over at most: from there on sets are too many for what they add.
REACH = 24


@dataclass(frozen=True)
class _Set:
    """Steps at once, where the first of them stands: seconds, and the buffers that are then held longer."""

    members: tuple[int, ...]
    seconds: float
    alone: float
    held: tuple[Span, ...]

    @property
    def words(self) -> str:
        first, last = self.members[0], self.members[-1]
        if last - first + 1 == len(self.members):
            return f"steps {first} to {last}"
        return f"steps {', '.join(map(str, self.members))}"


def with_streams(plan: Plan, device: Device, most: int) -> Plan:
    """The plan with up to ``most`` kernels at once, where that is faster. ``most`` below 2, or a device that has no
    streams, gives the plan back."""
    if most < 2 or device.kind not in ("cuda", "rocm"):
        return plan
    before = needs(plan.steps)
    found = _sets(plan, device, most, before)
    if not found:
        return plan
    peak = plan.peak.get("device", 0)
    held = reserved_bytes(plan.buffers, plan.arena, len(plan.steps)).bytes
    choices = tuple(
        Choice(
            each.words,
            (
                Way("one after the other", each.alone),
                Way("at once", each.seconds, frozenset(map(str, each.members)), each.held),
            ),
        )
        for each in found
    )
    answer = choose_ways(ScheduleProblem(choices, held, peak))
    taken = [each for each, way in zip(found, answer.taken, strict=True) if way]
    changed = _applied(plan, taken) if taken else plan
    if changed.peak.get("device", 0) > peak:  # arenas may be held longer than their buffers
        taken = [each for each in taken if _together(each.members)]
        changed = _applied(plan, taken) if taken else plan
    moved = sum(not _together(each.members) for each in taken)
    forward = f", {moved} with steps that were brought forward" if moved else ""
    # However they are ordered and on however many streams, steps wait for what they read.
    chain: list[float] = []
    for step, needed in zip(plan.steps, before, strict=True):
        chain.append(step.seconds + max((chain[i] for i in needed), default=0.0))
    decision = Decision(
        kind="order and streams",
        subject=f"{len(found)} sets of steps that need nothing of each other, {len(taken)} of them at once{forward}",
        chosen="at once where faster" if taken else "one after the other",
        alternatives=(
            Alternative(what="one after the other", value=plan.seconds),
            *((Alternative(what="at once where faster", value=changed.seconds),) if taken else ()),
        ),
        bound=min(changed.seconds, max(chain, default=0.0)),
    )
    return msgspec.structs.replace(changed, decisions=(*plan.decisions, decision))


def _together(members: Sequence[int]) -> bool:
    return members[-1] - members[0] + 1 == len(members)


def _sets(plan: Plan, device: Device, most: int, before: Sequence[Sequence[int]]) -> list[_Set]:
    """Sets that take less time at once than one after the other: of each step with the next ones that need nothing of
    what comes between."""
    steps, graphs = plan.steps, _graphs(plan)
    found = []
    for first, step in enumerate(steps):
        if not _movable(step):
            continue
        members = [first]
        for other in range(first + 1, min(first + REACH, len(steps))):
            if len(members) == most or graphs[other] != graphs[first] or steps[other].phase != step.phase:
                break
            if not _movable(steps[other]):
                break
            if max(before[other], default=-1) >= first:
                continue
            members.append(other)
            alone = sum(steps[each].seconds for each in members)
            together = at_once([steps[each] for each in members], device, plan.dtype)
            held = _held_longer(plan, tuple(members))
            if together < alone and held is not None:
                found.append(_Set(tuple(members), together, alone, held))
    return found


def _graphs(plan: Plan) -> list[int]:
    """The innermost graph of each step; -1 for none."""
    found = [-1] * len(plan.steps)
    ranges = sorted(enumerate(plan.graphs), key=lambda item: item[1].first_step - item[1].last_step)
    for number, graph in ranges:
        for position in range(graph.first_step, min(graph.last_step + 1, len(found))):
            found[position] = number
    return found


def _movable(step: Step) -> bool:
    return step.kind in ("kernel", "library") and step.stream == MAIN and not step.rendezvous and step.device == 0


def at_once(steps: Sequence[Step], device: Device, dtype: str) -> float:
    """Seconds of steps at once: a launch, the longest of them, or all of their work at the rate that the device has for
    it, and the wait for the last of them, which takes as long as a launch."""
    launch = device.launch.value
    longest = work = 0.0
    for step in steps:
        alone = max(step.seconds - launch, 0.0)
        rate = device.matrix_rate(dtype or "f32")
        least = max(step.flop / rate, step.bytes_moved / device.bandwidth)
        longest, work = max(longest, alone), work + min(alone, least)
    return 2 * launch + max(longest, work)


def _held_longer(plan: Plan, members: tuple[int, ...]) -> tuple[Span, ...] | None:
    """What the buffers of such steps hold beyond their lives: results of a step that is brought forward from there on,
    and all of it to the end of the set. None where two of them lie at one place then."""
    first, last = members[0], members[-1]
    touched = {b for position in members for b in (*plan.steps[position].reads, *plan.steps[position].writes)}
    if _together(members):  # a buffer may live there that none of them names
        touched |= {b.id for b in plan.buffers if b.tier == "device" and b.upper > first and b.lower <= last}
    spans: list[Span] = []
    lives: list[tuple[Buffer, int, int]] = []
    for buffer in plan.buffers:
        if buffer.id not in touched or buffer.tier != "device":
            continue
        lower, upper = (first if buffer.lower > first else buffer.lower), max(buffer.upper, last + 1)
        if lower == buffer.lower and upper == buffer.upper:
            continue
        lives.append((buffer, lower, upper))
        if buffer.offset is not None:  # its arena is held anyway
            continue
        if lower < buffer.lower:
            spans.append(Span(lower, buffer.lower - 1, buffer.bytes))
        if upper > buffer.upper:
            spans.append(Span(buffer.upper, upper - 1, buffer.bytes))
    changed = {buffer.id: (lower, upper) for buffer, lower, upper in lives}
    for buffer, lower, upper in lives:
        if buffer.offset is None:
            continue
        for other in plan.buffers:
            if other.id == buffer.id or other.offset is None or other.arena_key != buffer.arena_key:
                continue
            begin, end = changed.get(other.id, (other.lower, other.upper))
            apart = other.offset >= buffer.offset + buffer.bytes or buffer.offset >= other.offset + other.bytes
            if begin < upper and lower < end and not apart:
                return None
    return tuple(spans)


def _applied(plan: Plan, taken: Sequence[_Set]) -> Plan:
    """The plan with these sets, in the order that they make."""
    moved = {position: each.members[0] for each in taken for position in each.members[1:]}
    order = sorted(range(len(plan.steps)), key=lambda position: (moved.get(position, position), position))
    place = {position: new for new, position in enumerate(order)}
    steps = [plan.steps[position] for position in order]
    lower, upper = _lives(plan, order, place)
    for each in sorted(taken, key=lambda item: item.members[0]):
        first = place[each.members[0]]
        last = first + len(each.members) - 1
        earlier = [step for step in steps[:first] if step.device == 0]
        joined = [step.id for step in earlier if step.stream == MAIN][-1:]
        joined += [step.id for step in earlier if step.stream.startswith(f"{MAIN} ")][-MOST_STREAMS:]
        longest = max(range(first, last + 1), key=lambda position: steps[position].seconds)
        for number, position in enumerate(range(first, last + 1)):
            step = steps[position]
            steps[position] = msgspec.structs.replace(
                step,
                stream=MAIN if number == 0 else f"{MAIN} {number + 1}",
                seconds=each.seconds if position == longest else step.seconds,
                depends=tuple(sorted({*step.depends, *joined})),
            )
        waiting = [steps[position].id for position in range(first, last + 1)]
        after = next((at for at in range(last + 1, len(steps)) if steps[at].device == 0), None)
        if after is not None:
            depends = tuple(sorted({*steps[after].depends, *waiting}))
            steps[after] = msgspec.structs.replace(steps[after], depends=depends)
        for buffer in plan.buffers:
            if buffer.tier == "device" and upper[buffer.id] > first and lower[buffer.id] <= last:
                lower[buffer.id] = min(lower[buffer.id], first)
                upper[buffer.id] = max(upper[buffer.id], last + 1)
    timeline = simulate(steps)
    buffers = tuple(msgspec.structs.replace(b, lower=lower[b.id], upper=upper[b.id]) for b in plan.buffers)
    freed, frees = {identity for step in steps for identity in step.frees}, dict[int, list[int]]()
    for buffer in buffers:
        if buffer.id in freed:
            frees.setdefault(buffer.upper - 1, []).append(buffer.id)
    made = tuple(
        msgspec.structs.replace(step, start=start, frees=tuple(frees.get(position, ())))
        for position, (step, start) in enumerate(zip(steps, timeline.start, strict=True))
    )
    peak = {tier: reserved_bytes(buffers, plan.arena, len(steps), tier).peak for tier in plan.peak}
    return msgspec.structs.replace(plan, steps=made, buffers=buffers, seconds=timeline.makespan, peak=peak)


def _lives(plan: Plan, order: Sequence[int], place: Mapping[int, int]) -> tuple[dict[int, int], dict[int, int]]:
    """First and last positions of the buffers in another order of the steps. A buffer that begins with a step begins
    with the first of those that use it; one that ends before the plan does ends with the last of them."""
    uses: dict[int, list[int]] = {}
    for position in order:
        step = plan.steps[position]
        for identity in dict.fromkeys((*step.reads, *step.writes)):
            uses.setdefault(identity, []).append(place[position])
    lower, upper = {}, {}
    for buffer in plan.buffers:
        # What lives on although nothing names it, as in the order before: no step there comes later than it did.
        begin = place[buffer.lower] if buffer.lower < len(order) else buffer.lower
        used = uses.get(buffer.id, [begin])
        lower[buffer.id] = 0 if buffer.lower == 0 else min([begin, *used])
        end = place[buffer.upper - 1] + 1 if 0 < buffer.upper < len(order) else buffer.upper
        upper[buffer.id] = max([end, *(position + 1 for position in used)])
    return lower, upper
