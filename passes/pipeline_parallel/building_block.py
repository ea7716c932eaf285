"""Schedules by repetition: when each pass of one microbatch begins, and how long until the next microbatch's.

The method is that of Qi et al. (Pipeline parallelism with controllable memory, 2024): lay out one microbatch so that
its copies, an interval apart, never meet on a rank; repeat; let each pass run as early as its rank's order allows. The
lifespan of a microbatch on a rank, in intervals, is the number of microbatches that the rank holds.
"""

from __future__ import annotations

from collections.abc import Mapping

from .schedule import Pass, Schedule


def repeat(
    name: str,
    microbatches: int,
    placement: tuple[int, ...],
    begin: Mapping[tuple[str, int], float],
    interval: float,
    *,
    vocabulary: str = "",
    embedding: bool = False,
) -> Schedule:
    """The schedule whose pass (kind, stage) of microbatch k stands at ``begin[kind, stage] + k * interval``."""
    ranks = max(placement) + 1
    timed: list[list[tuple[float, int, Pass]]] = [[] for _ in range(ranks)]
    shell = Schedule(name, microbatches, placement, ((),) * ranks, vocabulary, embedding)
    for number, ((kind, stage), time) in enumerate(begin.items()):
        for microbatch in range(microbatches):
            each = Pass(kind, stage, microbatch)
            timed[shell.rank_of(each)].append((time + microbatch * interval, number, each))
    orders = tuple(tuple(each for _, _, each in sorted(items)) for items in timed)
    return Schedule(name, microbatches, placement, orders, vocabulary, embedding)


def next_at(time: float, phase: float, interval: float) -> float:
    """The first moment from ``time`` on that is ``phase`` modulo ``interval``."""
    wait = (phase - time) % interval
    # Rounding may make a wait of nothing one of almost a whole interval.
    return time + (0.0 if interval - wait < 1e-9 * interval else wait)
