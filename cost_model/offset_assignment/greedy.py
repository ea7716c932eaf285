"""First-fit and best-fit placement in a given order, compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..compiled import compiled
from .tables import Ints, Tables
from .time_blocks import BIG, find_hole, insert, make_blocks


@compiled
def _place(
    order: Ints, best: bool, limit: int, stop: Ints, sections: int, lower: Ints, upper: Ints, first: Ints, last: Ints,
    size: Ints, alignment: Ints, offsets: Ints, half: Ints, row_start: Ints, start: Ints, count: Ints, in_floor: Ints,
    floor: Ints, listed: NDArray[np.int32],
) -> int:  # fmt: skip
    height = 0
    for b in order:
        offset = find_hole(
            b, best, lower, upper, first, last, size, alignment, offsets, half, row_start, start, count, in_floor,
            floor, listed,
        )  # fmt: skip
        offsets[b] = offset
        height = max(height, offset + size[b])
        if height > limit or stop[0] != 0:
            return int(max(height, limit + 1))
        insert(
            b, first, last, size, offsets, sections, half, row_start, start, count, in_floor, floor, listed
        )  # fmt: skip
    return int(height)


def place(
    tables: Tables, order: Ints, best: bool = False, limit: int = BIG, stop: Ints | None = None
) -> tuple[int, Ints]:
    """Place buffers in order, each into the lowest hole that it fits (if ``best``: the tightest).

    Gives up as soon as a buffer would end above ``limit``, or when another thread sets ``stop[0]``.

    Returns:
        (height, offsets) in bytes; a height above ``limit`` comes with incomplete offsets.
    """
    offsets = np.zeros(tables.size.size, np.int64)
    height = _place(
        np.ascontiguousarray(order, np.int64), best, limit, np.zeros(1, np.int64) if stop is None else stop,
        tables.sections, tables.lower, tables.upper, tables.first_section, tables.last_section, tables.size,
        tables.alignment, offsets, *make_blocks(tables),
    )  # fmt: skip
    return int(height), offsets
