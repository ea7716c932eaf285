"""First fit in plain Python, for problems so small that loading compiled code would take longer than solving them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence


def first_fit(
    order: Sequence[int], lower: Sequence[int], upper: Sequence[int], size: Sequence[int], alignment: Sequence[int]
) -> tuple[int, list[int]]:
    """Place buffers in order, each at the lowest offset free for all of its life. O(n) a buffer.

    Returns:
        (height, offset of each buffer), in bytes.
    """
    placed: list[tuple[int, int, int, int]] = []  # offset, end, lower, upper, sorted by offset
    offsets = [0] * len(size)
    height = 0
    for b in order:
        begin, end, need, step = lower[b], upper[b], size[b], alignment[b]
        cursor = 0
        for offset, top, other_begin, other_end in placed:
            if offset >= cursor + need:
                break
            if other_begin < end and other_end > begin and top > cursor:
                cursor = -(-top // step) * step
        offsets[b] = cursor
        insort(placed, (cursor, cursor + need, begin, end))
        height = max(height, cursor + need)
    return height, offsets


def orders(
    lower: Sequence[int], upper: Sequence[int], size: Sequence[int], contention: Sequence[int]
) -> list[tuple[str, list[int]]]:
    """The orders worth trying first, by name. ``contention``: the largest load (bytes) that a buffer meets."""
    count = range(len(size))
    keys = {
        "contention, area": lambda b: (-contention[b], -size[b] * (upper[b] - lower[b])),
        "lifetime, size": lambda b: (lower[b] - upper[b], -size[b]),
        "size, lifetime": lambda b: (-size[b], lower[b] - upper[b]),
        "area": lambda b: (-size[b] * (upper[b] - lower[b]), lower[b]),
        "contention, lifetime": lambda b: (-contention[b], lower[b] - upper[b], -size[b]),
        "contention, size": lambda b: (-contention[b], -size[b], lower[b] - upper[b]),
        "start": lambda b: (lower[b], lower[b] - upper[b]),
        "end": lambda b: (-upper[b], lower[b] - upper[b]),
    }
    return [(name, sorted(count, key=key)) for name, key in keys.items()]
