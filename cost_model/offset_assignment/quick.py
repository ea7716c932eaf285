"""First fit in plain Python, for problems so small that loading compiled code would take longer than solving them."""

from __future__ import annotations

import random
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


def reorder(
    offsets: Sequence[int],
    columns: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
    padding: Sequence[int],
    target: int,
    trials: int,
    seed: int,
) -> tuple[int, list[int]]:
    """Improve a first fit: move a buffer at the peak, or one that shares its time, to another place of the order.

    Args:
        offsets: of the placement to begin with.
        columns: lower, upper, size and alignment, as for ``first_fit``.
        padding: bytes of each size that a buffer with nothing above it does not need.
        target: height without padding at which to stop.

    Returns:
        (height without padding, offsets), never higher than the placement given.
    """
    lower, upper, size, _ = columns
    count = len(size)
    generator = random.Random(seed)

    def height_of(placed: Sequence[int]) -> int:
        return max((placed[b] + size[b] - padding[b] for b in range(count)), default=0)

    order = sorted(range(count), key=lambda b: (offsets[b], -size[b]))
    best, height = list(offsets), height_of(offsets)
    for _ in range(trials):
        if height <= target:
            break
        peak = next(b for b in order if best[b] + size[b] - padding[b] == height)
        sharing = [b for b in range(count) if lower[b] < upper[peak] and lower[peak] < upper[b]]
        moved = peak if generator.random() < 0.3 else generator.choice(sharing)
        trial = [b for b in order if b != moved]
        trial.insert(generator.randrange(count), moved)
        placed = first_fit(trial, *columns)[1]
        reached = height_of(placed)
        if reached <= height:
            height, best, order = reached, placed, trial
    return height, best
