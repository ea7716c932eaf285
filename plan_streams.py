"""Kernels beside each other in a plan: which steps run at once, on streams of their own.

Steps that follow each other and need nothing of each other may run together: each begins when all before them have
ended, and what comes next waits for all. While they do, each takes as much of the device as it takes alone, so small
kernels overlap and large ones gain only their launches. Which sets of steps run together is chosen by
``cost_model.schedule_model``, within the peak that the plan has anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class _Set:
    """Steps ``first`` to ``last`` at once: seconds, and the buffers that are then held longer."""

    first: int
    last: int
    seconds: float
    alone: float
    held: tuple[Span, ...]


def with_streams(plan: Plan, device: Device, most: int) -> Plan:
    """The plan with up to ``most`` kernels at once, where that is faster. ``most`` below 2, or a device that has no
    streams, gives the plan back."""
    if most < 2 or device.kind not in ("cuda", "rocm"):
        return plan
    found = _sets(plan, device, most)
    if not found:
        return plan
    peak = plan.peak.get("device", 0)
    held = reserved_bytes(plan.buffers, plan.arena, len(plan.steps)).bytes
    choices = tuple(
        Choice(
            f"steps {each.first} to {each.last}",
            (
                Way("one after the other", each.alone),
                Way(
                    "at once",
                    each.seconds,
                    frozenset(str(position) for position in range(each.first, each.last + 1)),
                    each.held,
                ),
            ),
        )
        for each in found
    )
    answer = choose_ways(ScheduleProblem(choices, held, peak))
    taken = [each for each, way in zip(found, answer.taken, strict=True) if way]
    changed = _applied(plan, taken) if taken else plan
    offered = sum(each.alone for each in found)
    decision = Decision(
        kind="streams",
        subject=f"{len(found)} sets of steps that need nothing of each other, {len(taken)} of them at once",
        chosen="at once where faster" if taken else "one after the other",
        alternatives=(
            Alternative(what="one after the other", value=plan.seconds),
            *((Alternative(what="at once where faster", value=changed.seconds),) if taken else ()),
        ),
        bound=max(0.0, min(changed.seconds, plan.seconds - (offered - answer.bound))),
    )
    return msgspec.structs.replace(changed, decisions=(*plan.decisions, decision))


def _sets(plan: Plan, device: Device, most: int) -> list[_Set]:
    """Sets that take less time at once than one after the other."""
    steps, before = plan.steps, needs(plan.steps)
    found = []
    for first, step in enumerate(steps):
        if not _movable(step):
            continue
        for last in range(first + 1, min(first + most, len(steps))):
            if not _movable(steps[last]) or steps[last].phase != step.phase or max(before[last], default=-1) >= first:
                break
            members = steps[first : last + 1]
            alone, together = sum(each.seconds for each in members), at_once(members, device, plan.dtype)
            held = _held_longer(plan.buffers, first, last)
            if together < alone and held is not None:
                found.append(_Set(first, last, together, alone, held))
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


def _held_longer(buffers: Sequence[Buffer], first: int, last: int) -> tuple[Span, ...] | None:
    """What the buffers of such steps hold beyond their lives, for all of it is held from the first to the last. None
    where two of them lie at one place."""
    spans: list[Span] = []
    touched: list[Buffer] = []
    for buffer in buffers:
        if buffer.tier != "device" or buffer.upper <= first or buffer.lower > last:
            continue
        touched.append(buffer)
        if buffer.offset is not None:  # its arena is held anyway
            continue
        if buffer.lower > first:
            spans.append(Span(first, buffer.lower - 1, buffer.bytes))
        if buffer.upper <= last:
            spans.append(Span(buffer.upper, last, buffer.bytes))
    ended = [b for b in touched if b.upper <= last and b.offset is not None]
    for old in ended:
        for new in touched:
            if new is old or new.offset is None or new.lower < old.upper or new.arena_key != old.arena_key:
                continue
            if old.offset is not None and new.offset < old.offset + old.bytes and old.offset < new.offset + new.bytes:
                return None
    return tuple(spans)


def _applied(plan: Plan, taken: Sequence[_Set]) -> Plan:
    steps = list(plan.steps)
    lower, upper = {b.id: b.lower for b in plan.buffers}, {b.id: b.upper for b in plan.buffers}
    for each in sorted(taken, key=lambda item: item.first):
        earlier = [step for step in steps[: each.first] if step.device == 0]
        joined = [step.id for step in earlier if step.stream == MAIN][-1:]
        joined += [step.id for step in earlier if step.stream.startswith(f"{MAIN} ")][-MOST_STREAMS:]
        longest = max(range(each.first, each.last + 1), key=lambda position: steps[position].seconds)
        for number, position in enumerate(range(each.first, each.last + 1)):
            step = steps[position]
            steps[position] = msgspec.structs.replace(
                step,
                stream=MAIN if number == 0 else f"{MAIN} {number + 1}",
                seconds=each.seconds if position == longest else step.seconds,
                depends=tuple(sorted({*step.depends, *joined})),
            )
        waiting = [steps[position].id for position in range(each.first, each.last + 1)]
        after = next((at for at in range(each.last + 1, len(steps)) if steps[at].device == 0), None)
        if after is not None:
            depends = tuple(sorted({*steps[after].depends, *waiting}))
            steps[after] = msgspec.structs.replace(steps[after], depends=depends)
        for buffer in plan.buffers:
            if buffer.tier == "device" and buffer.upper > each.first and buffer.lower <= each.last:
                lower[buffer.id] = min(lower[buffer.id], each.first)
                upper[buffer.id] = max(upper[buffer.id], each.last + 1)
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
