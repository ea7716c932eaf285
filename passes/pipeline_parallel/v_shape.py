"""V-shaped schedules: rank r has the stages r and 2p - 1 - r, so the first and the last stage share rank 0.

``zb_v`` is Qi et al. (Zero bubble pipeline parallelism, 2024, section 6). ``v_half`` is Qi et al. (Pipeline parallelism
with controllable memory, 2024): half of 1F1B's activations, the same on each rank; with vocabulary passes it is the
combination of Yeung et al. (Balancing pipeline parallelism with vocabulary parallelism, 2024, section 5).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ...errors import ScheduleError
from .building_block import next_at, repeat
from .schedule import Pass, Schedule


def v_placement(ranks: int) -> tuple[int, ...]:
    return (*range(ranks), *reversed(range(ranks)))


def zb_v(ranks: int, microbatches: int) -> Schedule:
    """ZB-V: no bubble where forward, input gradient and weight gradient take equally long; 1F1B's activation memory."""
    many = max(2 * ranks - 1, microbatches)
    orders = []
    for rank in range(ranks):
        counts: dict[tuple[str, int], int] = {}
        order: list[Pass] = []

        def run(kinds: str, stage: int, counts: dict[tuple[str, int], int] = counts, order: list[Pass] = order) -> None:
            for kind in kinds:
                order.append(Pass(kind, stage, counts.setdefault((kind, stage), 0)))
                counts[kind, stage] += 1

        down, up = rank, 2 * ranks - 1 - rank
        for _ in range(2 * (ranks - rank) - 1):
            run("F", down)
        for _ in range(rank):
            run("F", up)
            run("F", down)
        for _ in range(ranks - rank):
            run("FIW", up)
        while counts["F", up] < counts["F", down] or counts["F", down] < many:
            if counts["F", down] < many:
                run("F", down)
            run("IW", down)
            run("FIW", up)
        for _ in range(rank):
            run("I", down)
            run("I", up)
        for _ in range(ranks - rank):
            run("IW", down)
        for stage in (up, down):
            for _ in range(counts["I", stage] - counts.get(("W", stage), 0)):
                run("W", stage)
        orders.append(tuple(each for each in order if each.microbatch < microbatches))
    return Schedule("zb-v", microbatches, v_placement(ranks), tuple(orders))


def v_half(ranks: int, microbatches: int, vocabulary: str = "", embedding: bool = False) -> Schedule:
    """V-Half, with vocabulary passes if wanted. Raises ScheduleError for the interlaced vocabulary, whose passes stop
    all ranks at once and fit no V."""
    if vocabulary == "interlaced":
        raise ScheduleError("interlaced vocabulary passes do not go with V-Half", remedy="take 1f1b")
    interval = 8 if vocabulary else 6
    best = min(_blocks(ranks, interval, vocabulary), key=lambda block: max(block.values()), default=None)
    if best is None:
        raise ScheduleError(f"no V-Half for {ranks} ranks", remedy="take an even number of ranks")
    begin: dict[tuple[str, int], float] = dict(best)
    if embedding:
        # Between two slots: the passes are short. As late as F of stage 0 allows, as early as its gradient does.
        end = begin["I", 0] + 1
        for rank in range(ranks):
            begin["E", rank] = -0.5
            begin["D", rank] = end + 0.5
    name = "v-half" + ("-vocabulary" if vocabulary else "")
    return repeat(name, microbatches, v_placement(ranks), begin, interval, vocabulary=vocabulary, embedding=embedding)


def _blocks(ranks: int, interval: int, vocabulary: str) -> Iterator[dict[tuple[str, int], int]]:
    """Layouts of one microbatch in slots, each pass one slot long, that repeat without meeting.

    Going down a pass waits ``down`` slots a rank, going up ``up``; over both directions half an interval a rank, which
    makes the lifespans of a rank's two stages together the same on all ranks.
    """
    half = interval // 2
    for forward_down, forward_up in itertools.product(range(1, half), repeat=2):
        for turns in itertools.product(range(1, interval + 1), range(1, 3 * interval), range(1, interval + 1)):
            block = _block(ranks, interval, vocabulary, (forward_down, forward_up), turns)
            if block is not None:
                yield block


def _block(
    ranks: int, interval: int, vocabulary: str, hops: tuple[int, int], turns: tuple[int, int, int]
) -> dict[tuple[str, int], int] | None:
    last = 2 * ranks - 1
    half = interval // 2
    begin: dict[tuple[str, int], int] = {}
    for rank in range(ranks):
        begin["F", rank] = hops[0] * rank
    top = begin["F", ranks - 1] + turns[0]
    for rank in range(ranks):
        begin["F", last - rank] = top + (ranks - 1 - rank) * hops[1]
    start = begin["F", last] + turns[1]
    for rank in range(ranks):
        begin["I", last - rank] = start + rank * (half - hops[1])
    top = begin["I", ranks] + turns[2]
    for rank in range(ranks):
        begin["I", rank] = top + (ranks - 1 - rank) * (half - hops[0])
    free = []
    for rank in range(ranks):
        taken = {begin[kind, stage] % interval for kind in "FI" for stage in (rank, last - rank)}
        if len(taken) < 4:
            return None
        free.append([slot for slot in range(interval) if slot not in taken])
    if vocabulary:
        barrier = begin["F", last] + 1
        for kind in "ST":
            for rank in range(ranks):
                time, slot = min((int(next_at(barrier, slot, interval)), slot) for slot in free[rank])
                begin[kind, rank] = time
                free[rank].remove(slot)
            if kind == "S" or vocabulary == "two-barriers":
                barrier = max(begin[kind, rank] for rank in range(ranks)) + 1
        if start < barrier:
            return None
    for rank in range(ranks):
        for stage in (last - rank, rank):
            time, slot = min((int(next_at(begin["I", stage] + 1, slot, interval)), slot) for slot in free[rank])
            begin["W", stage] = time
            free[rank].remove(slot)
    return begin
