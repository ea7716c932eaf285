"""Reinsertion search over placement orders: move, in the order of a first fit, buffers that hold the peak up.

A buffer at the peak rests on one below it, and so on to the bottom; this chain of *supporters* must change for the
height to fall. A move takes one of the chain and puts it elsewhere in the order, mostly earlier, or swaps two of them.
Then everything is placed anew, given up as soon as the height grows. Sideways moves are kept.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .tables import Ints, Tables
from .time_blocks import BIG


@compiled
def _place_all(
    order: Ints, lower: Ints, upper: Ints, size: Ints, alignment: Ints, limit: int, offsets: Ints, work: Ints
) -> int:  # fmt: skip
    """First fit without time blocks, which is quicker for a few thousand buffers. ``work`` has four rows: lower, upper,
    offset and end of the placed buffers, sorted by offset."""
    height = 0
    for placed in range(order.size):
        b = order[placed]
        lo, up, need, align = lower[b], upper[b], size[b], alignment[b]
        cursor = 0
        for i in range(placed):
            if work[2, i] >= cursor + need:
                break
            if work[0, i] < up and work[1, i] > lo and work[3, i] > cursor:
                cursor = -(-work[3, i] // align) * align
        height = max(height, cursor + need)
        if height > limit:
            return int(height)
        offsets[b] = cursor
        left, right = 0, placed
        while left < right:
            middle = (left + right) // 2
            if work[2, middle] < cursor:
                left = middle + 1
            else:
                right = middle
        for row in range(4):
            for i in range(placed, left, -1):
                work[row, i] = work[row, i - 1]
        work[0, left], work[1, left], work[2, left], work[3, left] = lo, up, cursor, cursor + need
    return int(height)


@compiled
def _search(
    order: Ints, target: int, iterations: int, seed: int, lower: Ints, upper: Ints, size: Ints, alignment: Ints,
    neighbours_start: Ints, neighbours: Ints, best_offsets: Ints, stop: Ints,
) -> int:  # fmt: skip
    """``order`` and ``best_offsets`` are updated in place; the result is the height reached."""
    np.random.seed(seed)
    count = order.size
    work = np.empty((4, count), np.int64)
    offsets = best_offsets.copy()
    height = _place_all(order, lower, upper, size, alignment, BIG, best_offsets, work)
    position = np.empty(count, np.int64)
    trial = order.copy()
    chain = np.empty(count, np.int64)
    for i in range(count):
        position[order[i]] = i
    for _ in range(iterations):
        if height <= target or stop[0] != 0:
            break
        start = np.random.randint(count)
        b = -1
        for i in range(count):
            c = (i + start) % count
            if best_offsets[c] + size[c] == height:
                b = c
                break
        found = 0
        while b >= 0 and found < count:
            chain[found] = b
            found += 1
            below, ties = -1, 0
            for index in range(neighbours_start[b], neighbours_start[b + 1]):
                c = neighbours[index]
                if 0 <= best_offsets[b] - best_offsets[c] - size[c] < alignment[b]:
                    ties += 1
                    if np.random.randint(ties) == 0:
                        below = c
            # Buffers without size may rest on each other in a circle: go down only.
            if below >= 0 and best_offsets[below] >= best_offsets[b]:
                below = -1
            b = below
        trial[:] = order
        one = chain[np.random.randint(found)]
        if np.random.random() < 0.5 and found > 1:
            other = chain[np.random.randint(found)]
            i, j = position[one], position[other]
            trial[i], trial[j] = other, one
        else:
            i = position[one]
            j = np.random.randint(count) if np.random.random() < 0.3 else np.random.randint(i + 1)
            while i > j:
                trial[i] = trial[i - 1]
                i -= 1
            while i < j:
                trial[i] = trial[i + 1]
                i += 1
            trial[j] = one
        reached = _place_all(trial, lower, upper, size, alignment, height, offsets, work)
        if reached <= height:
            height = reached
            order[:] = trial
            best_offsets[:] = offsets
            for i in range(count):
                position[order[i]] = i
    return height


def reinsert(tables: Tables, order: Ints, target: int, iterations: int, seed: int, stop: Ints) -> tuple[int, Ints]:
    """Improve a first fit by changing its order.

    Args:
        order: to begin with; updated to the order of the result.
        iterations: number of moves tried; the search ends earlier at ``target`` bytes or when ``stop[0]`` is set.

    Returns:
        (height, offsets) in bytes; the height is at most that of the first fit in the order given.
    """
    offsets = np.zeros(tables.size.size, np.int64)
    height = _search(
        order, target, iterations, seed, tables.lower, tables.upper, tables.size, tables.alignment,
        tables.neighbours_start, tables.neighbours, offsets, stop,
    )  # fmt: skip
    return int(height), offsets
