"""Placed buffers by time block: finds the holes open to a lifetime without looking at the whole timeline.

The timeline of sections is covered by rows of blocks, each row narrower than the last. The blocks of a row overlap by
half, so that a lifetime of up to half a width lies inside one block. A block lists the placed buffers that it meets,
sorted by offset, and knows its *floor*: the height up to which buffers that live through all of the block fill it
without a hole. A query scans the narrowest block that holds the lifetime, from its floor upwards. In a training graph
most of what is live lies in the floor, which is what makes 10^5 buffers tractable.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..compiled import compiled
from .tables import Ints, Tables

BIG = 1 << 62
#: Into how many parts the rows after the first cut the timeline.
_PARTS = (8, 64)
#: Rows that would need lists of more entries than this in all are left out.
_MOST_ENTRIES = 40_000_000


class Blocks(NamedTuple):
    """Arrays of the structure. ``half``: half the width of each row's blocks in sections; ``row_start``: number of a
    row's first block; ``start``: where a block's list begins in ``listed``; ``filled``: its length now; ``in_floor``:
    how many of its entries make the floor; ``floor``: height of the floor in bytes."""

    half: Ints
    row_start: Ints
    start: Ints
    filled: Ints
    in_floor: Ints
    floor: Ints
    listed: NDArray[np.int32]


def make_blocks(tables: Tables) -> Blocks:
    """Empty blocks with room for every buffer of ``tables``."""
    sections = max(tables.sections, 1)
    halves: list[int] = []
    room: list[Ints] = []
    rows, entries = [0], 0
    for parts in (1, *_PARTS):
        half = sections if parts == 1 else -(-sections // (2 * parts))
        blocks = -(-sections // half)
        change = np.zeros(blocks + 1, np.int64)
        np.add.at(change, np.maximum(tables.first_section // half - 1, 0), 1)
        np.add.at(change, tables.last_section // half + 1, -1)
        lengths = np.cumsum(change)[:-1]
        entries += int(lengths.sum())
        if halves and (half < 2 or entries > _MOST_ENTRIES):
            break
        halves.append(half)
        room.append(lengths)
        rows.append(rows[-1] + blocks)
    lengths = np.concatenate(room)
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    filled, in_floor, floor = (np.zeros(lengths.size, np.int64) for _ in range(3))
    listed = np.empty(int(start[-1]), np.int32)
    return Blocks(np.array(halves, np.int64), np.array(rows, np.int64), start, filled, in_floor, floor, listed)


@compiled
def insert(
    b: int, first: Ints, last: Ints, size: Ints, offsets: Ints, sections: int, half: Ints, row_start: Ints,
    start: Ints, count: Ints, in_floor: Ints, floor: Ints, listed: NDArray[np.int32],
) -> None:  # fmt: skip
    """Enter buffer ``b``, whose offset is set, into every block that it meets."""
    key = offsets[b]
    for row in range(half.size):
        low, high = first[b] // half[row] - 1, last[b] // half[row]
        for block in range(row_start[row] + max(low, 0), row_start[row] + high + 1):
            end = start[block] + count[block]
            left, right = start[block] + in_floor[block], end
            while left < right:
                middle = (left + right) // 2
                if offsets[listed[middle]] < key:
                    left = middle + 1
                else:
                    right = middle
            for i in range(end, left, -1):
                listed[i] = listed[i - 1]
            listed[left] = b
            count[block] += 1
            # The new buffer may close the gap between the floor and buffers above it.
            begin = (block - row_start[row]) * half[row]
            until = min(begin + 2 * half[row], sections) - 1
            while in_floor[block] < count[block]:
                other = listed[start[block] + in_floor[block]]
                if offsets[other] > floor[block] or first[other] > begin or last[other] < until:
                    break
                floor[block] = max(floor[block], offsets[other] + size[other])
                in_floor[block] += 1


@compiled
def find_hole(
    b: int, best: bool, lower: Ints, upper: Ints, first: Ints, last: Ints, size: Ints, alignment: Ints, offsets: Ints,
    half: Ints, row_start: Ints, start: Ints, count: Ints, in_floor: Ints, floor: Ints, listed: NDArray[np.int32],
) -> int:  # fmt: skip
    """Lowest offset at which ``b`` is free for all of its life; if ``best``, that of the tightest hole that has
    something above it, where there is one."""
    lo, up, need, align = lower[b], upper[b], size[b], alignment[b]
    block = 0
    for row in range(half.size - 1, 0, -1):
        candidate = first[b] // half[row]
        if last[b] < (candidate + 2) * half[row]:
            block = row_start[row] + candidate
            break
    cursor = -(-floor[block] // align) * align
    chosen, waste = -1, BIG
    for i in range(start[block] + in_floor[block], start[block] + count[block]):
        other = listed[i]
        bottom = offsets[other]
        if bottom >= cursor + need and not best:
            break
        if lower[other] < up and upper[other] > lo:
            if cursor + need <= bottom < cursor + need + waste:
                chosen, waste = cursor, bottom - cursor - need
            if bottom + size[other] > cursor:
                cursor = -(-(bottom + size[other]) // align) * align
    return chosen if chosen >= 0 else cursor
