"""1F1B with the vocabulary sharded over all ranks: with one or two barriers a microbatch, or interlaced.

The steady state is one interval in which each rank runs one pass of each kind. A forward and a backward hop from rank
to rank together take one interval, so the passes stand in the same relation on all ranks and each rank holds one
microbatch less than the rank before it, as in 1F1B. A barrier costs at most one interval more (Yeung et al., 2024,
section 5.2): ``ranks + 2`` microbatches live with two barriers, ``ranks + 1`` with one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ...errors import ScheduleError
from .building_block import next_at, repeat
from .schedule import Schedule

#: Lengths of the passes that the layout is made for, in units of a forward, where the caller knows none.
USUAL_LENGTHS = {"F": 1.0, "B": 2.0, "S": 0.25, "T": 0.25}


def vocabulary_1f1b(
    ranks: int,
    microbatches: int,
    vocabulary: str,
    *,
    embedding: bool = False,
    lengths: Mapping[str, float] | None = None,
) -> Schedule:
    """1F1B with S and T passes (E and D too, with ``embedding``). ``lengths``: usual seconds of F, B, S and T, which
    decide where in the interval S and T stand. Raises ScheduleError for an unknown ``vocabulary``."""
    if vocabulary == "interlaced":
        return interlaced(ranks, microbatches, embedding=embedding)
    if vocabulary not in ("one-barrier", "two-barriers"):
        raise ScheduleError(
            f"vocabulary passes {vocabulary!r} are unknown", remedy="one-barrier, two-barriers or interlaced"
        )
    length = dict(lengths or USUAL_LENGTHS)
    interval = sum(length[kind] for kind in "FBST")
    layouts = [_layout(ranks, order, length, interval, vocabulary) for order in itertools.permutations("BST")]
    begin = min(layouts, key=lambda layout: layout["B", 0] - layout["F", 0])
    if embedding:
        for rank in range(ranks):
            # E ends before the first stage's F wherever it stands, D begins after its B.
            begin["E", rank] = next_at(-interval, begin["F", rank], interval) - 1e-3 * interval
            begin["D", rank] = next_at(begin["B", 0] + length["B"], begin["B", rank], interval) + 1e-3 * interval
    placement = tuple(range(ranks))
    name = f"1f1b-{vocabulary}"
    return repeat(name, microbatches, placement, begin, interval, vocabulary=vocabulary, embedding=embedding)


def _layout(
    ranks: int, order: tuple[str, ...], length: Mapping[str, float], interval: float, vocabulary: str
) -> dict[tuple[str, int], float]:
    """When one microbatch's passes begin if each rank runs F and then ``order`` in each interval."""
    phase: dict[str, float] = {}
    time = length["F"]
    for kind in order:
        phase[kind] = time
        time += length[kind]
    hop = interval * length["F"] / (length["F"] + length["B"])
    begin: dict[tuple[str, int], float] = {("F", rank): rank * hop for rank in range(ranks)}
    last = ranks - 1
    barrier = begin["F", last] + length["F"]
    for kind in "ST":
        for rank in range(ranks):
            begin[kind, rank] = next_at(barrier, rank * hop + phase[kind], interval)
        if kind == "S" or vocabulary == "two-barriers":
            barrier = max(begin[kind, rank] for rank in range(ranks)) + length[kind]
    begin["B", last] = next_at(barrier, last * hop + phase["B"], interval)
    for rank in range(last):
        begin["B", rank] = begin["B", last] + (last - rank) * (interval - hop)
    return begin


def interlaced(ranks: int, microbatches: int, *, embedding: bool = False) -> Schedule:
    """All ranks run S and T of a microbatch at the same time (Lin et al., nnScaler, 2024). Between two such moments
    every rank has room for one forward and one backward; neighbours run them in opposite order, so a forward goes two
    ranks in that time and a backward one: 1.5 times 1F1B's microbatches are live."""
    placement = tuple(range(ranks))
    begin: dict[tuple[str, int], float] = {}
    for rank in range(ranks):
        behind = ranks - 1 - rank
        backward_first = behind % 2 == 0
        begin["F", rank] = -(behind // 2) + (0.5 if backward_first else 0.0)
        begin["B", rank] = 1 + behind + (0.0 if backward_first else 0.5)
        begin["S", rank], begin["T", rank] = 0.8, 0.9
    if embedding:
        for rank in range(ranks):
            begin["E", rank] = begin["F", 0] - 0.2
            begin["D", rank] = begin["B", 0] + 0.8
    return repeat("1f1b-interlaced", microbatches, placement, begin, 1.0, vocabulary="interlaced", embedding=embedding)
