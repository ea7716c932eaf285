"""How good a plan's schedule is: bounds that no order of its steps and no use of its streams could be below.

Time: the busiest stream, and the longest chain of steps that wait for each other. Memory: what is held while a step
runs, whatever ran before (``kernel_order.lower_bound``), where the graphs of a model run one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.plan import Buffer, Plan, Step
from .kernel_order import OrderProblem, Value, lower_bound, use_over

#: Plans with more steps get no bound on memory: it takes time quadratic in them.
MOST_STEPS = 4000


@dataclass(frozen=True)
class StreamLoad:
    """``busy``: seconds of its steps; ``alone``: seconds in which no other stream of the device works."""

    device: int
    stream: str
    steps: int
    busy: float
    alone: float


@dataclass(frozen=True)
class StepBounds:
    """Seconds and bytes of a plan's schedule with their bounds; ``peak`` counts live bytes of the device tier."""

    seconds: float
    longest_chain: float
    busiest: float
    peak: int
    peak_bound: int | None
    streams: tuple[StreamLoad, ...]

    @property
    def bound(self) -> float:
        return min(self.seconds, max(self.longest_chain, self.busiest))

    @property
    def gap(self) -> float:
        return (self.seconds - self.bound) / self.seconds if self.seconds else 0.0


def step_bounds(plan: Plan) -> StepBounds:
    steps = plan.steps
    before = needs(steps)
    chain: list[float] = []
    for step, needed in zip(steps, before, strict=True):
        chain.append(step.seconds + max((chain[i] for i in needed), default=0.0))
    streams = stream_loads(steps)
    problem = order_problem(plan, before)
    held = use_over(problem, range(len(steps)))
    alone = all(step.device == 0 for step in steps)
    bound = lower_bound(problem) if alone and len(steps) <= MOST_STEPS else None
    return StepBounds(
        seconds=plan.seconds,
        longest_chain=max(chain, default=0.0),
        busiest=max((load.busy for load in streams), default=0.0),
        peak=max(held, default=0),
        peak_bound=bound,
        streams=streams,
    )


def needs(steps: Sequence[Step]) -> list[tuple[int, ...]]:
    """For each step, the earlier ones that must run before it: those it depends on, that made what it reads, and that
    used what it writes anew. Steps that update the model wait for everything."""
    place = {step.id: index for index, step in enumerate(steps)}
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    found: list[tuple[int, ...]] = []
    for index, step in enumerate(steps):
        needed = {place[each] for each in step.depends if each in place}
        needed |= {writer[b] for b in step.reads if b in writer}
        for buffer in step.writes:
            needed.update(readers.get(buffer, ()))
            if buffer in writer:
                needed.add(writer[buffer])
        if step.kind == "optimizer":
            needed.update(i for i in range(index) if steps[i].device == step.device)
        needed.discard(index)
        found.append(tuple(sorted(needed)))
        for buffer in step.reads:
            readers.setdefault(buffer, []).append(index)
        for buffer in step.writes:
            writer[buffer] = index
            readers[buffer] = []
    return found


def order_problem(plan: Plan, before: Sequence[tuple[int, ...]], tier: str = "device") -> OrderProblem:
    """The plan's steps and live buffers of one tier as a problem of order."""
    users: dict[int, list[int]] = {}
    for index, step in enumerate(plan.steps):
        for buffer in dict.fromkeys((*step.reads, *step.writes)):
            users.setdefault(buffer, []).append(index)
    values = [
        _value(buffer, users.get(buffer.id, []), len(plan.steps)) for buffer in plan.buffers if buffer.tier == tier
    ]
    return OrderProblem(len(plan.steps), tuple(before), tuple(values))


def _value(buffer: Buffer, users: list[int], length: int) -> Value:
    given = buffer.lower == 0 and buffer.role in ("parameter", "buffer", "optimizer", "input")
    made = -1 if given or not users else users[0]
    return Value(buffer.bytes, made, tuple(users), kept=buffer.upper >= length)


def stream_loads(steps: Sequence[Step]) -> tuple[StreamLoad, ...]:
    found = []
    for key in dict.fromkeys((step.device, step.stream) for step in steps):
        mine = [step for step in steps if (step.device, step.stream) == key]
        others = [step for step in steps if step.device == key[0] and step.stream != key[1]]
        busy = sum(step.seconds for step in mine)
        together = _overlap(_spans(mine), _spans(others))
        found.append(StreamLoad(key[0], key[1], len(mine), busy, busy - together))
    return tuple(found)


def _spans(steps: Sequence[Step]) -> list[tuple[float, float]]:
    """Times at which any of the steps runs, as disjoint intervals in order."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted((step.start, step.start + step.seconds) for step in steps if step.seconds > 0):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _overlap(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total
