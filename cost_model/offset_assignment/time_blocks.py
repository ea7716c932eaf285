"""Placed buffers by time block: finds the holes open to a lifetime without looking at the whole timeline.

The timeline of sections is covered by blocks of three widths (all of it, an eighth, a 64th), each row of blocks
overlapping by half, so that a lifetime of up to half a width lies inside one block. A block lists the placed buffers
that it meets, sorted by offset. A query scans the list of the narrowest block that holds the lifetime: about as many
buffers as are live then, which is what makes 10^5 buffers tractable.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled
from .tables import Ints, Tables

BIG = 1 << 62


class Blocks(NamedTuple):
    """Arrays of the structure. ``half``: half the width of each row's blocks in sections; ``row_start``: number of a
    row's first block; ``start``: where a block's list begins in ``listed``; ``count``: its length now."""

    half: Ints
    row_start: Ints
    start: Ints
    count: Ints
    listed: NDArray[np.int32]


def make_blocks(tables: Tables) -> Blocks:
    """Empty blocks with room for every buffer of ``tables``."""
    sections = max(tables.sections, 1)
    halves = [sections]
    for parts in (8, 64):
        half = -(-sections // (2 * parts))
        if half >= 2:
            halves.append(half)
    rows = [0]
    room: list[Ints] = []
    for half in halves:
        blocks = -(-sections // half)
        first, last = _met(tables.first_section, tables.last_section, half)
        change = np.zeros(blocks + 1, np.int64)
        np.add.at(change, first, 1)
        np.add.at(change, last + 1, -1)
        room.append(np.cumsum(change)[:-1])
        rows.append(rows[-1] + blocks)
    sizes = np.concatenate(room)
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Blocks(
        np.array(halves, np.int64),
        np.array(rows, np.int64),
        start,
        np.zeros(sizes.size, np.int64),
        np.empty(int(start[-1]), np.int32),
    )


def _met(first: Ints, last: Ints, half: int) -> tuple[Ints, Ints]:
    """Blocks that sections first..last meet: block j covers sections [j * half, (j + 2) * half)."""
    return np.maximum(first // half - 1, 0), last // half


@compiled
def home(first: int, last: int, half: Ints, row_start: Ints) -> int:
    """The narrowest block that holds sections first..last (block 0 holds everything)."""
    for row in range(half.size - 1, 0, -1):
        block = first // half[row]
        if last < (block + 2) * half[row]:
            return int(row_start[row] + block)
    return 0


@compiled
def insert(
    b: int, first: Ints, last: Ints, offsets: Ints, half: Ints, row_start: Ints, start: Ints, count: Ints,
    listed: NDArray[np.int32],
) -> None:  # fmt: skip
    """Enter buffer ``b``, whose offset is set, into every block that it meets."""
    key = offsets[b]
    for row in range(half.size):
        low, high = first[b] // half[row] - 1, last[b] // half[row]
        for block in range(row_start[row] + max(low, 0), row_start[row] + high + 1):
            left, right = start[block], start[block] + count[block]
            while left < right:
                middle = (left + right) // 2
                if offsets[listed[middle]] < key:
                    left = middle + 1
                else:
                    right = middle
            for i in range(start[block] + count[block], left, -1):
                listed[i] = listed[i - 1]
            listed[left] = b
            count[block] += 1


@compiled
def remove(
    b: int, first: Ints, last: Ints, offsets: Ints, half: Ints, row_start: Ints, start: Ints, count: Ints,
    listed: NDArray[np.int32],
) -> None:  # fmt: skip
    """Take buffer ``b`` out of every block that it meets; its offset is still that of its entry."""
    key = offsets[b]
    for row in range(half.size):
        low, high = first[b] // half[row] - 1, last[b] // half[row]
        for block in range(row_start[row] + max(low, 0), row_start[row] + high + 1):
            left, right = start[block], start[block] + count[block]
            while left < right:
                middle = (left + right) // 2
                if offsets[listed[middle]] < key:
                    left = middle + 1
                else:
                    right = middle
            while listed[left] != b:
                left += 1
            count[block] -= 1
            for i in range(left, start[block] + count[block]):
                listed[i] = listed[i + 1]


@compiled
def find_hole(
    b: int, best: bool, limit: int, lower: Ints, upper: Ints, first: Ints, last: Ints, size: Ints, alignment: Ints,
    offsets: Ints, half: Ints, row_start: Ints, start: Ints, count: Ints, listed: NDArray[np.int32],
) -> int:  # fmt: skip
    """Lowest offset at which ``b`` is free for all of its life; if ``best``, that of the tightest hole that ends at or
    below ``limit`` and has something above it, where there is one."""
    lo, up, need, align = lower[b], upper[b], size[b], alignment[b]
    block = home(first[b], last[b], half, row_start)
    cursor = 0
    chosen, waste = -1, BIG
    for i in range(start[block], start[block] + count[block]):
        other = listed[i]
        bottom = offsets[other]
        if bottom >= cursor + need and not best:
            break
        if lower[other] < up and upper[other] > lo:
            if bottom - cursor - need < waste and bottom >= cursor + need and bottom <= limit:
                chosen, waste = cursor, bottom - cursor - need
            if bottom + size[other] > cursor:
                cursor = -(-(bottom + size[other]) // align) * align
    return chosen if chosen >= 0 else cursor
