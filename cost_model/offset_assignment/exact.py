"""Exact search for offsets within a capacity: canonical branch and bound, after MiniMalloc (Moffitt, ASPLOS 2023).

Buffers are placed in order of offset, each as low as the ones already placed allow; among equal offsets in order of
rank. Every packing can be pushed down into one of this form, so nothing is lost. A branch is given up when

- in some section of time the sizes still to be placed do not fit above the lowest offsets open to them: for each
  threshold t, ``t + sum of sizes with lowest offset >= t <= capacity`` (one machine with release dates);
- a buffer that was passed over could only end where it might as well have been put down before (dominance);
- what remains splits into parts that share no time, and one of the parts has no solution, whatever the others do.

Beside MiniMalloc's section inference (which uses the smallest threshold only) all thresholds are used here, and a
buffer that was passed over must rest on one still to be placed.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .tables import Ints, Tables

SOLVED, NO_SOLUTION, STOPPED = 1, 0, -1

# ``counters``: 0 nodes visited, 1 their limit, 2 length of the trail. ``stop[0]`` is set by another thread.


# Columns of a frame of the search (one frame: one placement to be chosen).
_START, _COUNT, _NEXT, _MARK, _FLOOR, _RANK, _CHILDREN, _CHILD, _CEILING = range(9)
_BIG = 1 << 62


@compiled
def _order_and_check(
    members: Ints, start: int, count: int, floor: int, floor_rank: int, capacity: int, size: Ints, rank: Ints,
    neighbours_start: Ints, neighbours: Ints, first_section: Ints, last_section: Ints, offsets: Ints, lowest: Ints,
    load: Ints, release: Ints, blame: Ints,
) -> int:  # fmt: skip
    """Sort ``members[start:start + count]`` by (release, rank); -1 if they cannot fit, else the ceiling.

    Release: the lowest offset that a buffer can still get. Ceiling: height below which the next placement must begin.
    """
    ceiling, begin, end = _BIG, _BIG, -1
    for i in range(start, start + count):
        b = members[i]
        release[b] = max(lowest[b], floor)
        ceiling = min(ceiling, lowest[b] + size[b])
        begin = min(begin, first_section[b])
        end = max(end, last_section[b])
    for i in range(start, start + count):
        b = members[i]
        if lowest[b] < floor or (lowest[b] == floor and rank[b] < floor_rank):
            # Passed over at its lowest offset: something still to come must lie under it and in its way.
            support = _BIG
            for index in range(neighbours_start[b], neighbours_start[b + 1]):
                other = neighbours[index]
                if offsets[other] < 0:
                    bottom = max(lowest[other], floor)
                    if bottom < lowest[b] + size[b]:
                        support = min(support, bottom + size[other])
            if support + size[b] > capacity:
                for section in range(first_section[b], last_section[b] + 1):
                    blame[section] += 1
                return -1
            release[b] = max(release[b], support)
    # Insertion sort: the parent's order is nearly right already.
    for i in range(start + 1, start + count):
        b = members[i]
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
        room = capacity - release[b]
        for section in range(first_section[b], last_section[b] + 1):
            load[section] += size[b]
            if load[section] > room:
                blame[section] += 1
                return -1
    return ceiling


@compiled
def _split(
    members: Ints, start: int, count: int, chosen: int, top: int, cut: bool, first_section: Ints, crossing: Ints,
    frame_children: Ints,
) -> int:  # fmt: skip
    """Copy the members but the chosen one to ``top``, grouped into parts that share no time; the number of parts.

    Each part is stored as its length followed by its members.
    """
    frame_children[0] = top
    if count == 1:
        return 0
    if not cut:
        members[top] = count - 1
        for i in range(start, start + count):
            if i != chosen:
                top += 1
                members[top] = members[i]
        frame_children[1] = top + 1
        return 1
    begin, end = _BIG, -1
    for i in range(start, start + count):
        if i != chosen:
            begin = min(begin, first_section[members[i]])
            end = max(end, first_section[members[i]])
    parts = 0
    while begin <= end:
        until = begin
        while until < end and crossing[until] > 0:
            until += 1
        head = top
        for i in range(start, start + count):
            if i != chosen and begin <= first_section[members[i]] <= until:
                top += 1
                members[top] = members[i]
        members[head] = top - head
        if top > head:
            parts += 1
            top += 1
        begin = until + 1
    frame_children[1] = top
    return parts


@compiled
def _run(
    members: Ints, capacity: int, node_limit: int, size: Ints, alignment: Ints, rank: Ints, neighbours_start: Ints,
    neighbours: Ints, first_section: Ints, last_section: Ints, offsets: Ints, lowest: Ints, crossing: Ints, load: Ints,
    trail: Ints, frames: Ints, nodes: Ints, stop: Ints, blame: Ints,
) -> int:  # fmt: skip
    """Depth-first search with its own stack (compiled recursive functions cannot be kept in numba's cache).

    ``members`` holds the root's buffers at its beginning and is the stack of all lists after them.
    """
    count = size.size
    release = np.zeros(count, np.int64)
    space = np.zeros(2, np.int64)
    depth, trail_length, result = 0, 0, -1
    frames[0, _START], frames[0, _COUNT], frames[0, _FLOOR], frames[0, _RANK] = 0, count, 0, -1
    entering = True
    while depth >= 0:
        frame = frames[depth]
        start, length = frame[_START], frame[_COUNT]
        if entering:
            nodes[0] += 1
            if nodes[0] > node_limit or stop[0] != 0:
                return -1
            frame[_MARK], frame[_NEXT] = trail_length, start
            frame[_CEILING] = _order_and_check(
                members, start, length, frame[_FLOOR], frame[_RANK], capacity, size, rank, neighbours_start,
                neighbours, first_section, last_section, offsets, lowest, load, release, blame,
            )  # fmt: skip
            if frame[_CEILING] < 0:
                entering, result = False, 0
                depth -= 1
                continue
        elif result == 1:
            # A part is done: go on to the next one of the same placement, or all of it is done.
            frame[_CHILD] += members[frame[_CHILD]] + 1
            frame[_CHILDREN] -= 1
            if frame[_CHILDREN] == 0:
                depth -= 1
                continue
            b = members[frame[_NEXT] - 1]
            child = frames[depth + 1]
            child[_START], child[_COUNT] = frame[_CHILD] + 1, members[frame[_CHILD]]
            child[_FLOOR], child[_RANK] = offsets[b], rank[b]
            # Lists of the part's own frames go behind all parts: see ``space`` below.
            entering = True
            depth += 1
            continue
        else:
            while trail_length > frame[_MARK]:
                trail_length -= 1
                b = trail[trail_length, 0]
                if b >= 0:
                    lowest[b] = trail[trail_length, 1]
                else:
                    b = -1 - b
                    offsets[b] = -1
                    for section in range(first_section[b], last_section[b]):
                        crossing[section] += 1
        # Choose the next placement of this frame.
        chosen = frame[_NEXT]
        while chosen < start + length:
            b = members[chosen]
            passed = lowest[b] < frame[_FLOOR] or (lowest[b] == frame[_FLOOR] and rank[b] < frame[_RANK])
            if not passed and lowest[b] < frame[_CEILING]:
                break
            chosen += 1
        if chosen == start + length:
            entering, result = False, 0
            depth -= 1
            continue
        frame[_NEXT] = chosen + 1
        b = members[chosen]
        offset = lowest[b]
        offsets[b] = offset
        top = offset + size[b]
        for index in range(neighbours_start[b], neighbours_start[b + 1]):
            other = neighbours[index]
            if offsets[other] < 0 and lowest[other] < top:
                trail[trail_length, 0] = other
                trail[trail_length, 1] = lowest[other]
                trail_length += 1
                lowest[other] = -(-top // alignment[other]) * alignment[other]
        trail[trail_length, 0] = -1 - b
        trail_length += 1
        cut = False
        for section in range(first_section[b], last_section[b]):
            crossing[section] -= 1
            cut = cut or crossing[section] == 0
        # Lists live on a stack: a frame's parts start behind every list that is still needed.
        behind = start + length if depth == 0 else max(start + length, frames[depth - 1, 9])
        frame[_CHILDREN] = _split(members, start, length, chosen, behind, cut, first_section, crossing, space)
        frame[_CHILD], frame[9] = space[0], space[1]
        if frame[_CHILDREN] == 0:
            entering, result = False, 1
            depth -= 1
            continue
        child = frames[depth + 1]
        child[_START], child[_COUNT] = frame[_CHILD] + 1, members[frame[_CHILD]]
        child[_FLOOR], child[_RANK] = offset, rank[b]
        entering = True
        depth += 1
    return result


def search(
    tables: Tables, rank: Ints, capacity: int, node_limit: int, stop: Ints, blame: Ints
) -> tuple[int, Ints, int]:
    """Search for offsets with all ends at or below ``capacity``.

    Args:
        stop: ``counters``-like array of one element; another thread sets it to 1 to end the search.

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
    trail = np.empty((tables.neighbours.size + count + 16, 2), np.int64)
    nodes = np.zeros(1, np.int64)
    status = _run(
        members, capacity, node_limit, tables.size, tables.alignment, rank, tables.neighbours_start, tables.neighbours,
        tables.first_section, tables.last_section, offsets, np.zeros(count, np.int64), np.cumsum(crossing),
        np.zeros(sections, np.int64), trail, np.zeros((count + 2, 10), np.int64), nodes, stop, blame,
    )  # fmt: skip
    return status, offsets, int(nodes[0])
