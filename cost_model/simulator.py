"""The timeline of a list of steps: the one place where time is added up.

Each stream of each device runs its steps in list order, one at a time. A step begins when its stream is free and all it
depends on has ended; the steps of one rendezvous (a collective) begin together when all have arrived, and end with the
longest. Times are seconds from 0. Everything is deterministic: the same steps give the same timeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ScheduleError
from ..ir.plan import Buffer, Step

#: (device index, stream name).
StreamKey = tuple[int, str]


@dataclass(frozen=True)
class StreamUse:
    """How long a stream works, and how long it does nothing between 0 and the makespan."""

    busy: float
    idle: float
    steps: int


@dataclass(frozen=True)
class Timeline:
    """``start[i]``, ``end[i]`` belong to the i-th step of the list. ``cause[i]`` is the step whose end let it begin, or
    -1. ``memory[(device, tier)]`` lists (time, bytes live from then on), in time order."""

    start: tuple[float, ...]
    end: tuple[float, ...]
    cause: tuple[int, ...]
    makespan: float
    streams: Mapping[StreamKey, StreamUse]
    memory: Mapping[tuple[int, str], tuple[tuple[float, int], ...]]

    def peak(self, tier: str = "device", device: int = 0) -> int:
        """Most bytes live at any time in a tier of a device."""
        return max((size for _, size in self.memory.get((device, tier), ())), default=0)

    def critical_path(self) -> tuple[int, ...]:
        """Indices of the steps that make the makespan, in time order: shortening anything else changes nothing."""
        if not self.end:
            return ()
        at = max(range(len(self.end)), key=lambda i: (self.end[i], -i))
        path = [at]
        while self.cause[at] >= 0:
            at = self.cause[at]
            path.append(at)
        return tuple(reversed(path))


def simulate(steps: Sequence[Step], buffers: Iterable[Buffer] = ()) -> Timeline:
    """Run the steps and return when each begins and ends, and the memory that ``buffers`` take meanwhile.

    Raises ScheduleError when steps wait for each other in a circle or depend on an unknown step. Linear in steps and
    dependencies.
    """
    start, end, cause = _times(steps)
    makespan = max(end, default=0.0)
    busy: dict[StreamKey, float] = {}
    count: dict[StreamKey, int] = {}
    for index, step in enumerate(steps):
        key = (step.device, step.stream)
        busy[key] = busy.get(key, 0.0) + (end[index] - start[index])
        count[key] = count.get(key, 0) + 1
    streams = {key: StreamUse(busy[key], makespan - busy[key], count[key]) for key in sorted(busy)}
    memory = _memory(steps, list(buffers), start, end, makespan)
    return Timeline(tuple(start), tuple(end), tuple(cause), makespan, streams, memory)


def _times(steps: Sequence[Step]) -> tuple[list[float], list[float], list[int]]:
    count = len(steps)
    index_of = {step.id: index for index, step in enumerate(steps)}
    followers: list[list[int]] = [[] for _ in range(count)]
    waiting = [0] * count
    last: dict[StreamKey, int] = {}
    members: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        key = (step.device, step.stream)
        before = last.get(key)
        if before is not None:
            followers[before].append(index)
            waiting[index] += 1
        last[key] = index
        for dependency in step.depends:
            source = index_of.get(dependency)
            if source is None:
                raise ScheduleError(
                    f"step {step.id} ({step.name!r}) depends on step {dependency}, which is not in the list",
                    remedy="keep every step that others depend on",
                )
            followers[source].append(index)
            waiting[index] += 1
        if step.rendezvous:
            members.setdefault(step.rendezvous, []).append(index)
    missing = {name: len(group) for name, group in members.items()}
    start = [0.0] * count
    end = [0.0] * count
    cause = [-1] * count
    ready = deque(index for index in range(count) if not waiting[index])
    done = 0
    while ready:
        index = ready.popleft()
        meeting = steps[index].rendezvous
        if meeting:
            missing[meeting] -= 1
            if missing[meeting]:
                continue
            group = members[meeting]
            latest = max(group, key=lambda i: (start[i], -i))
            finish = start[latest] + max(steps[i].seconds for i in group)
            for i in group:
                if start[i] < start[latest]:
                    start[i], cause[i] = start[latest], cause[latest]
                end[i] = finish
        else:
            group = [index]
            end[index] = start[index] + steps[index].seconds
        for i in group:
            done += 1
            finished = end[i]
            for follower in followers[i]:
                if finished > start[follower] or cause[follower] < 0:
                    start[follower], cause[follower] = max(finished, start[follower]), i
                waiting[follower] -= 1
                if not waiting[follower]:
                    ready.append(follower)
    if done < count:
        stuck = [step for step, left in zip(steps, waiting, strict=True) if left or step.rendezvous in missing][:5]
        names = ", ".join(
            f"{step.id} ({step.name!r})" for step in stuck if not step.rendezvous or missing[step.rendezvous]
        )
        raise ScheduleError(
            f"{count - done} step(s) wait for each other in a circle, among them {names}",
            remedy="remove a dependency of the circle, or reorder a stream's steps",
        )
    return start, end, cause


def _memory(
    steps: Sequence[Step], buffers: list[Buffer], start: list[float], end: list[float], makespan: float
) -> dict[tuple[int, str], tuple[tuple[float, int], ...]]:
    """Live bytes over time. A buffer is live from the earliest start of the steps at its first position or that touch
    it, to the latest end of those at its last position or that touch it; position 0 and the last one stand for the
    whole run's begin and end when no step touches the buffer there."""
    begin: dict[int, float] = {}
    until: dict[int, float] = {}
    place: dict[int, int] = {}
    for index, step in enumerate(steps):
        for identity in (*step.reads, *step.writes, *step.frees):
            if identity not in begin or start[index] < begin[identity]:
                begin[identity] = start[index]
            if identity not in until or end[index] > until[identity]:
                until[identity] = end[index]
            place.setdefault(identity, step.device)
    count = len(steps)
    changes: dict[tuple[int, str], list[tuple[float, int]]] = {}
    for buffer in buffers:
        if not buffer.bytes or buffer.lower >= buffer.upper or not count:
            continue
        low = 0.0 if buffer.lower == 0 else min(start[buffer.lower], begin.get(buffer.id, start[buffer.lower]))
        high = makespan if buffer.upper >= count else max(end[buffer.upper - 1], until.get(buffer.id, 0.0))
        events = changes.setdefault((place.get(buffer.id, 0), buffer.tier), [])
        events.append((low, buffer.bytes))
        events.append((high, -buffer.bytes))
    return {key: _running(changes[key]) for key in sorted(changes)}


def _running(events: list[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    """Sum of changes over time; at equal times frees come first, and one entry per time is kept."""
    events.sort()
    live = 0
    result: list[tuple[float, int]] = []
    for time, change in events:
        live += change
        if result and result[-1][0] == time:
            result[-1] = (time, live)
        else:
            result.append((time, live))
    return tuple(result)
