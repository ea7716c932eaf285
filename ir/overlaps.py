"""Rectangles of time and address, and which of them meet: the core of every check of a memory map."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """A rectangle: addresses ``low <= a < high`` in use at times ``lower <= t < upper``; ``owner`` names it."""

    lower: int
    upper: int
    low: int
    high: int
    owner: str


def overlaps(pieces: Sequence[Piece]) -> list[tuple[str, str, int]]:
    """Pairs of rectangles of different owners that share an address at one time: ``(owner, owner, time)``.

    Sweep line over time; live rectangles are kept sorted by address and disjoint, so that a new one needs comparing
    with its two neighbours only; one that clashes is reported and left out. Empty if and only if there is no overlap.
    """
    found: list[tuple[str, str, int]] = []
    # At one time ends come before starts: lifetimes are half-open.
    events = sorted(
        event
        for index, piece in enumerate(pieces)
        if piece.low < piece.high and piece.lower < piece.upper
        for event in ((piece.upper, 0, index), (piece.lower, 1, index))
    )
    live: list[tuple[int, int, int]] = []
    ignored: set[int] = set()
    for time, starts, index in events:
        piece = pieces[index]
        entry = (piece.low, piece.high, index)
        place = bisect.bisect_left(live, entry)
        if not starts:
            if index in ignored:
                ignored.discard(index)
            else:
                del live[place]
            continue
        clash = None
        if place > 0 and live[place - 1][1] > piece.low:
            clash = live[place - 1][2]
        elif place < len(live) and live[place][0] < piece.high:
            clash = live[place][2]
        if clash is None:
            live.insert(place, entry)
            continue
        ignored.add(index)
        found.append((pieces[clash].owner, piece.owner, time))
    return found
