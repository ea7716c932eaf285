"""List scheduling: each rank, when it is free, begins the most urgent pass that is ready and fits its memory.

It is the schedule for costs that fit no pattern, and what fills the beginning and the end of one. Passes of a kind and
stage go in the order of the microbatches. A stage holds no more microbatches than ``caps`` says, which keeps a rank's
stages from taking each other's memory: a forward is only ever held up by its own stage's backward, so nothing waits in
a circle.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace

from .precedence import Problem
from .schedule import Pass, Schedule

#: Smaller is more urgent.
Urgency = Callable[[Pass], float]


def list_schedule(problem: Problem, caps: Sequence[int], urgency: Urgency, name: str = "list") -> Schedule:
    """Order by urgency. ``caps``: most live microbatches of each virtual stage, at least 1. Raises ScheduleError when
    the problem's limit leaves a stage without room."""
    shell, costs = problem.shell, problem.costs
    end_kind = problem.end_kind
    kinds = [problem.kinds(rank) for rank in range(shell.ranks)]
    next_of = {key: 0 for own in kinds for key in own}
    live = [0] * shell.stages
    held = [0] * shell.ranks
    sizes = costs.activation or (0,) * shell.stages
    ended: dict[Pass, float] = {}
    orders: list[list[Pass]] = [[] for _ in range(shell.ranks)]
    ready_at: dict[Pass, float] = {}
    busy = [0.0] * shell.ranks
    events: list[tuple[float, int]] = [(0.0, rank) for rank in range(shell.ranks)]
    queued = set(events)
    freed: list[tuple[float, int]] = []

    def ready(each: Pass) -> float | None:
        """When all that the pass waits for has arrived; None while that is not known."""
        if each not in ready_at:
            arrivals = []
            for need, lag in problem.waits(each):
                if need not in ended:
                    return None
                arrivals.append(ended[need] + lag)
            ready_at[each] = max(arrivals, default=0.0)
        return ready_at[each]

    def full(rank: int, stage: int) -> bool:
        over = problem.limit is not None and held[rank] + sizes[stage] > problem.limit[rank]
        return over or live[stage] >= caps[stage]

    def wake(moment: float, rank: int) -> None:
        if (moment, rank) not in queued:
            queued.add((moment, rank))
            heapq.heappush(events, (moment, rank))

    while events:
        time, rank = heapq.heappop(events)
        queued.discard((time, rank))
        while freed and freed[0][0] <= time:
            stage = heapq.heappop(freed)[1]
            live[stage] -= 1
            held[shell.placement[stage]] -= sizes[stage]
        if busy[rank] > time:
            continue
        best: tuple[float, Pass] | None = None
        for kind, stage in kinds[rank]:
            microbatch = next_of[kind, stage]
            if microbatch == shell.microbatches or (kind == "F" and full(rank, stage)):
                continue
            each = Pass(kind, stage, microbatch)
            moment = ready(each)
            if moment is None:
                continue
            if moment > time:
                wake(moment, rank)
            elif best is None or urgency(each) < best[0]:
                best = (urgency(each), each)
        if best is None:
            continue
        each = best[1]
        orders[rank].append(each)
        next_of[each.kind, each.stage] += 1
        busy[rank] = ended[each] = time + costs.seconds(each)
        if each.kind == "F":
            live[each.stage] += 1
            held[rank] += sizes[each.stage]
        elif each.kind == end_kind:
            heapq.heappush(freed, (busy[rank], each.stage))
        wake(busy[rank], rank)
        for other in range(shell.ranks):
            if busy[other] <= time:  # it has nothing to do; perhaps it now knows when it will
                wake(time, other)
    found = replace(shell, name=name, orders=tuple(map(tuple, orders)))
    found.check()
    return found


def stage_caps(schedule: Schedule) -> tuple[int, ...]:
    """Most live microbatches of each virtual stage of a schedule, in the order of its lists."""
    end_kind = schedule.end_kind
    live = [0] * schedule.stages
    most = [0] * schedule.stages
    for order in schedule.orders:
        for each in order:
            if each.kind == "F":
                live[each.stage] += 1
                most[each.stage] = max(most[each.stage], live[each.stage])
            elif each.kind == end_kind:
                live[each.stage] -= 1
    return tuple(most)


def as_in(schedule: Schedule) -> Urgency:
    """Urgency by the place in another schedule's lists, counted in microbatches' worth of passes."""
    place = {each: float(index) for order in schedule.orders for index, each in enumerate(order)}
    return lambda each: place[each]


def by_kind(kinds: str) -> Urgency:
    """Urgency by kind, then the later stage, then the microbatch."""
    rank_of = {kind: index for index, kind in enumerate(kinds)}
    return lambda each: rank_of[each.kind] * 1e9 - each.stage * 1e6 + each.microbatch
