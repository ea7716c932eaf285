"""What is left to come: how low each buffer can still get, and whether all of it fits above that.

The *release* of a buffer is the lowest offset that it can still get. It only rises on the way down the search, so it is
kept, and taken back by the trail. Nine of ten placements fail, most of them in the sections that they touch and by the
smallest release alone; that is looked at first, and the sorting that the full check wants is left to what passes.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .tables import Ints

BIG = 1 << 62
#: Kinds of entries of the trail: what a placement changed, to be taken back.
LOWEST, FLOOR, PLACED, RELEASE = range(4)


@compiled
def passed_over(b: int, rank: Ints, floor: Ints, floor_rank: Ints, lowest: Ints) -> bool:
    """Whether the lowest offset of ``b`` is closed to it: those packings belong to another branch."""
    return bool(lowest[b] < floor[b] or (lowest[b] == floor[b] and rank[b] < floor_rank[b]))


@compiled
def _support(
    b: int, enough: int, floor: Ints, size: Ints, neighbours_start: Ints, neighbours: Ints, offsets: Ints, lowest: Ints
) -> int:
    """Lowest top that something still to come, in the way of ``b`` at its lowest offset, can have; ``enough`` or less
    is as good as none."""
    support = BIG
    for index in range(neighbours_start[b], neighbours_start[b + 1]):
        other = neighbours[index]
        if offsets[other] < 0:
            bottom = max(lowest[other], floor[other])
            if bottom < lowest[b] + size[b]:
                support = min(support, bottom + size[other])
                if support <= enough:
                    break
    return support


@compiled
def _raise(
    b: int, bottom: int, latest: Ints, first_section: Ints, last_section: Ints, release: Ints, trail: Ints, length: int,
    blame: Ints,
) -> int:  # fmt: skip
    """Raise the release of ``b`` to ``bottom``. Returns the new length of the trail; where it is then too late for
    ``b``, ``~length``, and its sections are blamed."""
    if bottom > latest[b]:
        for section in range(first_section[b], last_section[b] + 1):
            blame[section] += 1
        return ~length
    trail[length, 0], trail[length, 1], trail[length, 2] = RELEASE, b, release[b]
    release[b] = bottom
    return length + 1


@compiled
def raise_releases(
    members: Ints, start: int, count: int, touched: Ints, capacity: int, latest: Ints, size: Ints, rank: Ints,
    neighbours_start: Ints, neighbours: Ints, first_section: Ints, last_section: Ints, offsets: Ints, lowest: Ints,
    floor: Ints, floor_rank: Ints, remaining: Ints, release: Ints, least: Ints, trail: Ints, length: int, blame: Ints,
) -> int:  # fmt: skip
    """Raise the releases of members that live in the sections ``touched[0]`` to ``touched[1]``.

    ``remaining``: bytes still to be placed in each section; ``least`` is room to work in. Returns the new length of the
    trail, ``~length`` where the members cannot fit; then a section is blamed.
    """
    low, high = touched[0], touched[1]
    begin, end = low, high
    for i in range(start, start + count):
        b = members[i]
        if first_section[b] <= high and last_section[b] >= low:
            bottom = max(lowest[b], floor[b])
            if bottom > release[b]:
                length = _raise(b, bottom, latest, first_section, last_section, release, trail, length, blame)
                if length < 0:
                    return length
                begin, end = min(begin, first_section[b]), max(end, last_section[b])
    for section in range(begin, end + 1):
        least[section] = BIG
    for i in range(start, start + count):
        b = members[i]
        bottom, until = release[b], min(last_section[b], end) + 1
        # Unsigned indices, here and below: numba does not test them for being negative, and makes vector code.
        for section in range(np.uint64(max(first_section[b], begin)), np.uint64(max(until, 0))):
            least[section] = min(least[section], bottom)
    worst, most = 0, capacity
    for section in range(begin, end + 1):
        # Without a member, it is another part that remains there.
        if least[section] < BIG and least[section] + remaining[section] > most:
            worst, most = section, least[section] + remaining[section]
    if most > capacity:
        blame[worst] += 1
        return ~length
    for i in range(start, start + count):
        b = members[i]
        if first_section[b] > high or last_section[b] < low or not passed_over(b, rank, floor, floor_rank, lowest):
            continue
        support = _support(b, release[b], floor, size, neighbours_start, neighbours, offsets, lowest)
        if support > release[b]:
            length = _raise(b, support, latest, first_section, last_section, release, trail, length, blame)
            if length < 0:
                return length
    return length


@compiled
def order_and_check(
    members: Ints, start: int, count: int, capacity: int, size: Ints, rank: Ints, first_section: Ints,
    last_section: Ints, release: Ints, load: Ints, blame: Ints,
) -> bool:  # fmt: skip
    """Sort ``members[start:start + count]`` by (release, rank); False if they cannot fit above their releases.

    ``load`` becomes the members' bytes in each section.
    """
    begin, end = BIG, -1
    # Insertion sort: the parent's order is nearly right already.
    for i in range(start, start + count):
        b = members[i]
        begin, end = min(begin, first_section[b]), max(end, last_section[b])
        j = i
        while j > start:
            a = members[j - 1]
            if release[a] < release[b] or (release[a] == release[b] and rank[a] <= rank[b]):
                break
            members[j] = a
            j -= 1
        members[j] = b
    for section in range(begin, end + 1):
        load[section] = 0
    for i in range(start + count - 1, start - 1, -1):
        b = members[i]
        need, most = size[b], 0
        for section in range(np.uint64(first_section[b]), np.uint64(last_section[b] + 1)):
            load[section] += need
            most = max(most, load[section])
        if most > capacity - release[b]:
            for section in range(first_section[b], last_section[b] + 1):
                if load[section] > capacity - release[b]:
                    blame[section] += 1
                    break
            return False
    return True
