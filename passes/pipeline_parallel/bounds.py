"""A lower bound on the makespan of any order of the passes.

Microbatches are alike, so some best order runs each kind of pass of each stage in the order of the microbatches; and a
rank that may hold c microbatches cannot begin the forward of microbatch k + c before the backward of k has ended. With
these precedences added, each pass has a *head* (the longest path to it) and a *tail* (the longest path from its end).
One rank alone needs at least what Jackson's preemptive schedule with heads and tails needs (Carlier, The one-machine
sequencing problem, 1982).

A rank with several stages shares its memory between them: until it first frees something it can have run only so many
forwards, and what else is ready by then; everything else comes later.
"""

from __future__ import annotations

import heapq

from .precedence import Problem, passes_by_microbatch
from .schedule import Pass


def lower_bound(problem: Problem) -> float:
    """Seconds that no schedule of the problem can beat, its optimizer included."""
    heads, tails = heads_and_tails(problem)
    shell = problem.shell
    by_rank: list[list[Pass]] = [[] for _ in range(shell.ranks)]
    for each in heads:
        by_rank[shell.rank_of(each)].append(each)
    found = 0.0
    for rank, passes in enumerate(by_rank):
        jobs = [(heads[each], problem.costs.seconds(each), tails[each]) for each in passes]
        found = max(found, _jackson(jobs), _first_release(problem, rank, passes, heads, tails))
    return found + max(problem.costs.finish, default=0.0)


def heads_and_tails(problem: Problem) -> tuple[dict[Pass, float], dict[Pass, float]]:
    """Longest path to the begin of each pass, and from its end to the end of everything but the optimizer."""
    order = passes_by_microbatch(problem)
    seconds = problem.costs.seconds
    before: dict[Pass, list[tuple[Pass, float]]] = {each: problem.waits(each) for each in order}
    for each in order:
        kind, stage, microbatch = each
        if microbatch:
            before[each].append((Pass(kind, stage, microbatch - 1), 0.0))
        if kind == "F":
            limit = problem.live_limit(problem.shell.rank_of(each))
            if limit is not None and microbatch >= limit:
                before[each].append((Pass(problem.end_kind, stage, microbatch - limit), 0.0))
    heads: dict[Pass, float] = {}
    for each in order:
        heads[each] = max((heads[need] + seconds(need) + lag for need, lag in before[each]), default=0.0)
    tails = {each: problem.costs.sum_seconds(each, problem.end_kind) for each in order}
    for each in reversed(order):
        behind = tails[each] + seconds(each)
        for need, lag in before[each]:
            tails[need] = max(tails[need], behind + lag)
    return heads, tails


def _jackson(jobs: list[tuple[float, float, float]]) -> float:
    """Makespan of the preemptive one-machine schedule that always runs the ready job with the longest tail."""
    waiting = sorted(jobs)
    ready: list[tuple[float, float]] = []
    time = makespan = 0.0
    at = 0
    while at < len(waiting) or ready:
        if not ready:
            time = max(time, waiting[at][0])
        while at < len(waiting) and waiting[at][0] <= time:
            heapq.heappush(ready, (-waiting[at][2], waiting[at][1]))
            at += 1
        negative_tail, left = heapq.heappop(ready)
        until = min(time + left, waiting[at][0]) if at < len(waiting) else time + left
        left -= until - time
        time = until
        if left > 1e-12:
            heapq.heappush(ready, (negative_tail, left))
        else:
            makespan = max(makespan, time - negative_tail)
    return makespan


def _first_release(
    problem: Problem, rank: int, passes: list[Pass], heads: dict[Pass, float], tails: dict[Pass, float]
) -> float:
    """What memory forbids at the beginning: before the first activations are freed, only as many forwards as fit."""
    sizes = [problem.costs.activation[each.stage] for each in passes if each.kind == "F" and problem.costs.activation]
    if problem.limit is None or not sizes or min(sizes) <= 0:
        return 0.0
    seconds = problem.costs.seconds
    release = min(heads[each] + seconds(each) for each in passes if each.kind == problem.end_kind)
    fit = problem.limit[rank] // min(sizes)
    forwards = sorted((seconds(each) for each in passes if each.kind == "F"), reverse=True)
    others = (each for each in passes if each.kind != "F" and heads[each] < release)
    early = sum(forwards[:fit]) + sum(min(seconds(each), release - heads[each]) for each in others)
    work = sum(map(seconds, passes))
    return release + max(0.0, work - early) + min(tails[each] for each in passes)
