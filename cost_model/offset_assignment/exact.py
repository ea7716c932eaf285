"""Exact search for offsets within a capacity: canonical branch and bound, after MiniMalloc (Moffitt, ASPLOS 2023).

Every packing can be pushed down until each buffer lies as low as the others allow; only such packings are looked for.
At each step a *valley* is chosen (see ``choose_valley``): a set of buffers of which the lowest, whichever it is, must
lie at the lowest offset open to it. That one is placed; the others of the valley come later in the order of (offset,
rank), so that no packing is met twice. A valley may be local in time, and then no decision elsewhere stands between a
mistake and its discovery, as it does where buffers are placed in order of offset over the whole timeline; and of the
valleys that there are, the one with the fewest candidates is taken, often one or none. A branch is given up when

- in some section of time the sizes still to be placed do not fit above the lowest offsets open to them: for each
  threshold t, ``t + sum of sizes with lowest offset >= t <= capacity`` (one machine with release dates; MiniMalloc's
  section inference is the smallest threshold alone);
- a buffer that was passed over at its lowest offset has nothing left to come that it could rest on;
- its top buffer stands on one of the same lifetime that comes after it in rank: the two could change places;
- what remains splits into parts that share no time, and one of the parts has no solution, whatever the others do.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .branching import choose_valley, split_members
from .releases import FLOOR, LOWEST, PLACED, RELEASE, order_and_check, raise_releases
from .tables import Ints, Tables

SOLVED, NO_SOLUTION, STOPPED = 1, 0, -1

# Columns of a frame of the search (one frame: one placement to be chosen).
_START, _COUNT, _NEXT, _MARK, _AMONG, _CANDIDATES, _CHILDREN, _CHILD, _BEHIND = range(9)


@compiled
def _run(
    members: Ints, capacity: int, latest: Ints, node_limit: int, size: Ints, alignment: Ints, rank: Ints,
    priority: Ints, neighbours_start: Ints, neighbours: Ints, first_section: Ints, last_section: Ints, offsets: Ints,
    lowest: Ints, crossing: Ints, trail: Ints, frames: Ints, nodes: Ints, stop: Ints, blame: Ints,
) -> int:  # fmt: skip
    """Depth-first search with its own stack (compiled recursive functions cannot be kept in numba's cache).

    ``members`` holds the root's buffers at its beginning and is the stack of all lists after them.
    """
    count = size.size
    release = np.full(count, -1, np.int64)
    floor, floor_rank = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    load = np.zeros(blame.size, np.int64)
    valley = np.zeros((count + 2) * (count + 2), np.int64)
    inside, work = np.zeros(count, np.int64), np.zeros(count, np.int64)
    space = np.zeros(2, np.int64)
    remaining = np.zeros(blame.size, np.int64)
    for b in range(count):
        for section in range(first_section[b], last_section[b] + 1):
            remaining[section] += size[b]
    # The sections in which the last placement changed something.
    touched = np.zeros(2, np.int64)
    touched[1] = blame.size - 1
    depth, trail_length, result = 0, 0, -1
    frames[0, _START], frames[0, _COUNT] = 0, count
    entering = True
    while depth >= 0:
        frame = frames[depth]
        start, length = frame[_START], frame[_COUNT]
        among = depth * count
        if entering:
            nodes[0] += 1
            if nodes[0] > node_limit or stop[0] != 0:
                return -1
            frame[_NEXT] = 0
            trail_length = raise_releases(
                members, start, length, touched, capacity, latest, size, rank, neighbours_start, neighbours,
                first_section, last_section, offsets, lowest, floor, floor_rank, remaining, release, load, trail,
                trail_length, blame,
            )  # fmt: skip
            if trail_length < 0:
                trail_length = ~trail_length
                fits = False
            else:
                fits = order_and_check(
                    members, start, length, capacity, size, rank, first_section, last_section, release, load, blame
                )
            if not fits:
                entering, result = False, 0
                depth -= 1
                continue
            frame[_MARK] = trail_length
            frame[_AMONG], frame[_CANDIDATES] = choose_valley(
                members, start, length, capacity, priority, size, alignment, latest, rank, neighbours_start, neighbours,
                first_section, last_section, offsets, lowest, floor, floor_rank, release, load, inside, work, valley,
                among, blame,
            )  # fmt: skip
        elif result == 1:
            # A part is done: go on to the next one of the same placement, or all of it is done.
            frame[_CHILD] += members[frame[_CHILD]] + 1
            frame[_CHILDREN] -= 1
            if frame[_CHILDREN] == 0:
                depth -= 1
                continue
            child = frames[depth + 1]
            child[_START], child[_COUNT] = frame[_CHILD] + 1, members[frame[_CHILD]]
            entering = True
            touched[0], touched[1] = 0, blame.size - 1
            depth += 1
            continue
        else:
            while trail_length > frame[_MARK]:
                trail_length -= 1
                b = trail[trail_length, 1]
                if trail[trail_length, 0] == LOWEST:
                    lowest[b] = trail[trail_length, 2]
                elif trail[trail_length, 0] == FLOOR:
                    floor[b], floor_rank[b] = trail[trail_length, 2], trail[trail_length, 3]
                elif trail[trail_length, 0] == RELEASE:
                    release[b] = trail[trail_length, 2]
                else:
                    offsets[b] = -1
                    for section in range(first_section[b], last_section[b]):
                        crossing[section] += 1
                    for section in range(first_section[b], last_section[b] + 1):
                        remaining[section] += size[b]
        # Choose the next placement of this frame.
        chosen = frame[_NEXT]
        if chosen == frame[_CANDIDATES]:
            entering, result = False, 0
            depth -= 1
            continue
        frame[_NEXT] = chosen + 1
        b = valley[among + chosen]
        offset = lowest[b]
        offsets[b] = offset
        low, high = first_section[b], last_section[b]
        for section in range(low, high + 1):
            remaining[section] -= size[b]
        for i in range(among, among + frame[_AMONG]):
            other = valley[i]
            if other != b and (floor[other] < offset or (floor[other] == offset and floor_rank[other] < rank[b])):
                trail[trail_length, 0], trail[trail_length, 1] = FLOOR, other
                trail[trail_length, 2], trail[trail_length, 3] = floor[other], floor_rank[other]
                trail_length += 1
                floor[other], floor_rank[other] = offset, rank[b]
                low, high = min(low, first_section[other]), max(high, last_section[other])
        top = offset + size[b]
        for index in range(neighbours_start[b], neighbours_start[b + 1]):
            other = neighbours[index]
            if offsets[other] < 0 and lowest[other] < top:
                trail[trail_length, 0], trail[trail_length, 1], trail[trail_length, 2] = LOWEST, other, lowest[other]
                trail_length += 1
                low, high = min(low, first_section[other]), max(high, last_section[other])
                lowest[other] = -(-top // alignment[other]) * alignment[other]
        trail[trail_length, 0], trail[trail_length, 1] = PLACED, b
        trail_length += 1
        touched[0], touched[1] = low, high
        cut = False
        for section in range(first_section[b], last_section[b]):
            crossing[section] -= 1
            cut = cut or crossing[section] == 0
        # Lists live on a stack: a frame's parts start behind every list that is still needed.
        behind = start + length if depth == 0 else max(start + length, frames[depth - 1, _BEHIND])
        position = start
        while members[position] != b:
            position += 1
        frame[_CHILDREN] = split_members(members, start, length, position, behind, cut, first_section, crossing, space)
        frame[_CHILD], frame[_BEHIND] = space[0], space[1]
        if frame[_CHILDREN] == 0:
            entering, result = False, 1
            depth -= 1
            continue
        child = frames[depth + 1]
        child[_START], child[_COUNT] = frame[_CHILD] + 1, members[frame[_CHILD]]
        entering = True
        depth += 1
    return result


def search(
    tables: Tables, rank: Ints, priority: Ints, capacity: int, node_limit: int, stop: Ints, blame: Ints
) -> tuple[int, Ints, int]:
    """Search for offsets with all ends (without padding) at or below ``capacity`` bytes.

    Args:
        rank: of each buffer, where several may be placed next at one offset; a permutation.
        priority: of each section: of valleys with as few candidates, that with the greatest is taken; empty: always
            the lowest valley.
        node_limit: placements tried before the search gives up.
        stop: of one element; another thread sets it to 1 to end the search.
        blame: for each section the number of times that it could not be packed is added here.

    Returns:
        (SOLVED, NO_SOLUTION or STOPPED, offsets in bytes (-1 where unplaced), nodes visited).
    """
    count, sections = tables.size.size, tables.sections
    offsets = np.full(count, -1, np.int64)
    crossing = np.zeros(sections + 1, np.int64)
    np.add.at(crossing, tables.first_section, 1)
    np.add.at(crossing, tables.last_section, -1)
    # Each level of the search keeps its lists: lengths n, n - 1, ..., with a head for each part.
    members = np.empty((count + 2) * (count + 4), np.int64)
    members[:count] = np.argsort(rank)
    trail = np.empty((tables.neighbours.size + 3 * (count + 2) * (count + 2), 4), np.int64)
    nodes = np.zeros(1, np.int64)
    padded = capacity + int(tables.padding.max(initial=0))
    latest = capacity - tables.size + tables.padding
    status = _run(
        members, padded, latest, node_limit, tables.size, tables.alignment, rank, priority, tables.neighbours_start,
        tables.neighbours, tables.first_section, tables.last_section, offsets, np.zeros(count, np.int64),
        np.cumsum(crossing), trail, np.zeros((count + 2, 10), np.int64), nodes, stop, blame,
    )  # fmt: skip
    return status, offsets, int(nodes[0])
