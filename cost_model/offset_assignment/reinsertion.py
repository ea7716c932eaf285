"""Reinsertion search: take a buffer that sticks out above a target, and those in its way, and place them anew.

The value of a placement is its *excess*: the bytes by which its buffers end above the target, summed. A move takes a
buffer with excess, wants it at a lower place (on top of a buffer that shares its time, or at the bottom), takes out
what lies there, and puts all back, each into the lowest or the tightest hole. It is kept if the excess grows by no more
than a random allowance that shrinks as the search goes on (threshold accepting, Dueck and Scheuer 1990).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled
from .tables import Ints, Tables
from .time_blocks import BIG, find_hole, home, insert, make_blocks, remove

#: Most buffers that one move takes out.
_MOST = 24


@compiled
def _search(
    target: int, iterations: int, seed: int, warmth: float, lower: Ints, upper: Ints, first: Ints, last: Ints,
    size: Ints, alignment: Ints, offsets: Ints, best_offsets: Ints, stop: Ints, half: Ints, row_start: Ints,
    start: Ints, count: Ints, listed: NDArray[np.int32],
) -> int:  # fmt: skip
    """Search from ``offsets``; the lowest placement seen goes to ``best_offsets``, its height is the result."""
    np.random.seed(seed)
    buffers = size.size
    over = np.empty(buffers, np.int64)
    place_in_over = np.full(buffers, -1, np.int64)
    sticking = 0
    height = 0
    excess = 0
    for b in range(buffers):
        insert(b, first, last, offsets, half, row_start, start, count, listed)
        end = offsets[b] + size[b]
        height = max(height, end)
        if end > target:
            over[sticking], place_in_over[b] = b, sticking
            sticking += 1
            excess += end - target
    best_offsets[:] = offsets
    best_excess = excess
    moved = np.empty(_MOST, np.int64)
    previous = np.empty(_MOST, np.int64)
    for iteration in range(iterations):
        if sticking == 0 or stop[0] != 0:
            break
        p = over[np.random.randint(sticking)]
        # A wanted offset: the top of a random buffer under p in time, or the bottom.
        block = home(first[p], last[p], half, row_start)
        wanted = 0
        for _ in range(4):
            q = listed[start[block] + np.random.randint(count[block])]
            if q != p and lower[q] < upper[p] and upper[q] > lower[p] and offsets[q] < offsets[p]:
                wanted = offsets[q] if np.random.random() < 0.5 else offsets[q] + size[q]
                break
        wanted = -(-wanted // alignment[p]) * alignment[p]
        if wanted >= offsets[p]:
            wanted = 0
        moved[0] = p
        taken = 1
        for i in range(start[block], start[block] + count[block]):
            q = listed[i]
            if offsets[q] >= wanted + size[p]:
                break
            if q != p and offsets[q] + size[q] > wanted and lower[q] < upper[p] and upper[q] > lower[p]:
                if taken == _MOST:
                    taken = _MOST + 1
                    break
                moved[taken] = q
                taken += 1
        if taken > _MOST:
            continue
        before = 0
        for i in range(taken):
            b = moved[i]
            previous[i] = offsets[b]
            before += max(0, offsets[b] + size[b] - target)
            remove(b, first, last, offsets, half, row_start, start, count, listed)
        # The order of return: p first, then largest first or at random.
        at_random = np.random.random() < 0.5
        for i in range(1, taken):
            j = i
            if at_random:
                j = 1 + np.random.randint(i)
            else:
                while j > 1 and size[moved[j - 1]] < size[moved[i]]:
                    j -= 1
            b, old = moved[i], previous[i]
            if at_random:
                moved[i], previous[i] = moved[j], previous[j]
            else:
                for k in range(i, j, -1):
                    moved[k], previous[k] = moved[k - 1], previous[k - 1]
            moved[j], previous[j] = b, old
        allowance = before + int(-np.log(1.0 - np.random.random()) * warmth * target * (1.0 - iteration / iterations))
        after = 0
        returned = 0
        tight = np.random.random() < 0.3
        for i in range(taken):
            b = moved[i]
            if i == 0:
                offsets[b] = wanted
            else:
                offsets[b] = find_hole(
                    b, tight, target, lower, upper, first, last, size, alignment, offsets, half, row_start, start,
                    count, listed,
                )  # fmt: skip
            after += max(0, offsets[b] + size[b] - target)
            if after > allowance:
                break
            insert(b, first, last, offsets, half, row_start, start, count, listed)
            returned += 1
        if returned < taken:
            for i in range(returned):
                remove(moved[i], first, last, offsets, half, row_start, start, count, listed)
            for i in range(taken):
                offsets[moved[i]] = previous[i]
                insert(moved[i], first, last, offsets, half, row_start, start, count, listed)
            continue
        excess += after - before
        for i in range(taken):
            b = moved[i]
            sticks = offsets[b] + size[b] > target
            if sticks and place_in_over[b] < 0:
                over[sticking], place_in_over[b] = b, sticking
                sticking += 1
            elif not sticks and place_in_over[b] >= 0:
                sticking -= 1
                hole = place_in_over[b]
                over[hole] = over[sticking]
                place_in_over[over[hole]] = hole
                place_in_over[b] = -1
        if excess < best_excess:
            best_excess = excess
            reached = target if sticking == 0 else 0
            for i in range(sticking):
                reached = max(reached, offsets[over[i]] + size[over[i]])
            if reached < height:
                height = reached
                best_offsets[:] = offsets
    if sticking == 0:
        best_offsets[:] = offsets
    height = 0
    for b in range(buffers):
        height = max(height, best_offsets[b] + size[b])
    return height


def reinsert(
    tables: Tables, offsets: Ints, target: int, iterations: int, seed: int, stop: Ints, warmth: float = 0.002
) -> tuple[int, Ints]:
    """Search from a sound placement for one of at most ``target`` bytes.

    Args:
        iterations: number of moves tried; the search ends earlier at ``target`` or when ``stop[0]`` is set.
        warmth: excess that a move may add at first, on average, as a share of ``target``.

    Returns:
        (height, offsets) in bytes of the lowest placement seen; never above the one given.
    """
    best = np.empty_like(offsets)
    height = _search(
        target, iterations, seed, warmth, tables.lower, tables.upper, tables.first_section, tables.last_section,
        tables.size, tables.alignment, offsets.copy(), best, stop, *make_blocks(tables),
    )  # fmt: skip
    return int(height), best


__all__ = ["BIG", "reinsert"]
