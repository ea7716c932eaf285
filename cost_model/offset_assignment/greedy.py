"""First-fit and best-fit placement in a given order, and reinsertion search over the order.

Both keep the buffers already placed sorted by offset, so that one scan upwards finds the holes that a buffer could
take: O(n) a buffer, and less where a low hole fits. Gaps are handled through *pieces*, see ``place_pieces``.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .tables import Ints

_BIG = 1 << 62


@compiled
def place(
    order: Ints, lower: Ints, upper: Ints, size: Ints, alignment: Ints, best: bool, limit: int, offsets: Ints,
    work: Ints,
) -> int:  # fmt: skip
    """Place buffers in order, each into the lowest hole (or, if ``best``, the tightest), and return the height.

    Gives up as soon as a buffer would end above ``limit``; the result is then the end it would have. ``work`` has five
    rows of as many elements as buffers: lower, upper, offset, end and index of the placed ones, sorted by offset.
    """
    height = 0
    for placed, b in enumerate(order):
        lo, up, need, align = lower[b], upper[b], size[b], alignment[b]
        cursor = 0
        chosen, waste = -1, _BIG
        for i in range(placed):
            bottom = work[2, i]
            if not best and bottom >= cursor + need:
                break
            if work[0, i] < up and work[1, i] > lo:
                if bottom >= cursor + need and bottom - cursor - need < waste:
                    chosen, waste = cursor, bottom - cursor - need
                if work[3, i] > cursor:
                    cursor = -(-work[3, i] // align) * align
        if chosen < 0:
            chosen = cursor
        end = chosen + need
        if end > height:
            height = end
            if height > limit:
                return int(height)
        offsets[b] = chosen
        # Insert, keeping the order of offsets (binary search, then shift).
        left, right = 0, placed
        while left < right:
            middle = (left + right) // 2
            if work[2, middle] < chosen:
                left = middle + 1
            else:
                right = middle
        for row in range(4):
            for i in range(placed, left, -1):
                work[row, i] = work[row, i - 1]
        work[0, left], work[1, left], work[2, left], work[3, left] = lo, up, chosen, end
    return height


@compiled
def improve(
    order: Ints, lower: Ints, upper: Ints, size: Ints, alignment: Ints, target: int, iterations: int, seed: int,
    neighbours_start: Ints, neighbours: Ints, best_offsets: Ints, stop: Ints,
) -> int:  # fmt: skip
    """Reinsertion search: bring forward, in the order, buffers that make the peak or hold it up.

    A change is kept if the height does not grow. ``order`` and ``best_offsets`` are updated in place; the result is the
    height reached. Ends at ``target``, after ``iterations`` placements, or when ``stop[0]`` is set.
    """
    np.random.seed(seed)
    count = order.size
    work = np.empty((4, count), np.int64)
    offsets = best_offsets.copy()
    height = place(order, lower, upper, size, alignment, False, _BIG, offsets, work)
    best_offsets[:] = offsets
    position = np.empty(count, np.int64)
    trial = order.copy()
    culprits = np.empty(count, np.int64)
    for i in range(count):
        position[order[i]] = i
    for _ in range(iterations):
        if height <= target or stop[0] != 0:
            break
        # The chain from a buffer at the peak down to the bottom: each rests on the one before it.
        found = 0
        start = np.random.randint(count)
        b = -1
        for i in range(count):
            c = (i + start) % count
            if best_offsets[c] + size[c] == height:
                b = c
                break
        while b >= 0 and found < count:
            culprits[found] = b
            found += 1
            below = -1
            ties = 0
            for index in range(neighbours_start[b], neighbours_start[b + 1]):
                c = neighbours[index]
                gap = best_offsets[b] - best_offsets[c] - size[c]
                if gap >= 0 and gap < alignment[b]:
                    ties += 1
                    if np.random.randint(ties) == 0:
                        below = c
            b = below
        trial[:] = order
        first = culprits[np.random.randint(found)]
        if np.random.random() < 0.5 and found > 1:
            second = culprits[np.random.randint(found)]
            i, j = position[first], position[second]
            trial[i], trial[j] = second, first
        else:
            i = position[first]
            j = np.random.randint(count) if np.random.random() < 0.3 else np.random.randint(i + 1)
            while i > j:
                trial[i] = trial[i - 1]
                i -= 1
            while i < j:
                trial[i] = trial[i + 1]
                i += 1
            trial[j] = first
        reached = place(trial, lower, upper, size, alignment, False, height, offsets, work)
        if reached <= height:
            height = reached
            order[:] = trial
            best_offsets[:] = offsets
            for i in range(count):
                position[order[i]] = i
    return height
