"""Buffers with gaps: a life in pieces, each with its own bytes in use, all at one offset.

A piece of another buffer that shares time with one of ours forbids an interval of offsets; a buffer goes to the lowest
offset that none forbids. The order of placement is improved by moving buffers that end highest to the front.
"""

from __future__ import annotations

import time

import numpy as np

from ..compiled import compiled
from .problem import Problem, Result
from .tables import Ints

#: Orders tried at most.
_TRIALS = 4000


@compiled
def _place_pieces(
    order: Ints, size: Ints, alignment: Ints, first_piece: Ints, buffer_of: Ints, low: Ints, high: Ints,
    neighbours_start: Ints, neighbours: Ints, limit: int, offsets: Ints,
) -> int:  # fmt: skip
    """First fit in an order; pieces of buffer b are ``first_piece[b]:first_piece[b + 1]``. Gives up above ``limit``."""
    offsets[:] = -1
    height = 0
    begins = np.empty(neighbours.size + 1, np.int64)
    ends = np.empty(neighbours.size + 1, np.int64)
    for b in order:
        count = 0
        for piece in range(first_piece[b], first_piece[b + 1]):
            for index in range(neighbours_start[piece], neighbours_start[piece + 1]):
                other = neighbours[index]
                offset = offsets[buffer_of[other]]
                if offset >= 0 and buffer_of[other] != b:
                    # Offsets strictly between these two make the pieces overlap.
                    begins[count] = offset + low[other] - high[piece]
                    ends[count] = offset + high[other] - low[piece]
                    count += 1
        cursor = 0
        for index in np.argsort(begins[:count]):
            if begins[index] >= cursor:
                break
            if ends[index] > cursor:
                cursor = -(-ends[index] // alignment[b]) * alignment[b]
        offsets[b] = cursor
        height = max(height, cursor + size[b])
        if height > limit:
            return int(height)
    return int(height)


def solve_gapped(problem: Problem, capacity: int | None, bound: int, deadline: float, seed: int) -> Result:
    """As ``solver.solve``, for buffers with gaps."""
    pieces, buffer_of, low = problem.pieces
    count = problem.size.size
    counts = np.bincount(buffer_of, minlength=count)
    first_piece = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    goal = bound if capacity is None else max(bound, capacity)
    best = np.zeros(count, np.int64)

    def place(order: Ints, limit: int) -> tuple[int, Ints]:
        offsets = np.empty(count, np.int64)
        height = _place_pieces(
            order, problem.size, problem.alignment, first_piece, buffer_of, low, low + pieces.size,
            pieces.neighbours_start, pieces.neighbours, limit, offsets,
        )  # fmt: skip
        return int(height), offsets

    used = np.bincount(buffer_of, pieces.size.astype(np.float64) * pieces.length, count)
    height = 1 << 62
    order = np.arange(count, dtype=np.int64)
    for keys in ((problem.size, used), (used,), (used, problem.size), (problem.upper - problem.lower,)):
        trial = np.lexsort(keys)[::-1].astype(np.int64)
        reached, offsets = place(trial, height)
        if reached < height:
            height, best, order = reached, offsets, trial
    generator = np.random.default_rng(seed)
    for _ in range(_TRIALS):
        if height <= goal or time.perf_counter() >= deadline:
            break
        highest = np.flatnonzero(best[order] + problem.size[order] == height)
        at = int(generator.choice(highest))
        if generator.random() < 0.3:
            at = int(generator.integers(count))
        to = int(generator.integers(at + 1))
        trial = np.insert(np.delete(order, at), to, order[at])
        reached, offsets = place(trial, height)
        if reached <= height:
            height, best, order = reached, offsets, trial
    if capacity is not None and bound > capacity:
        status = "infeasible"
    elif height <= bound:
        status = "optimal"
    else:
        status = "timeout" if capacity is not None and height > capacity else "feasible"
    return Result(best, height, bound, status, "first fit of pieces")
