"""Exact search for offsets within a capacity: canonical branch and bound, after MiniMalloc (Moffitt, ASPLOS 2023).

Every packing can be pushed down until each buffer lies as low as the others allow; only such packings are looked for.
At each step a *valley* is chosen (see ``_valley``): a set of buffers of which the lowest, whichever it is, must lie at
the lowest offset open to it. That one is placed; the others of the valley come later in the order of (offset, rank), so
that no packing is met twice. A valley may be local in time, and then no decision elsewhere stands between a mistake and
its discovery, as it does where buffers are placed in order of offset over the whole timeline. A branch is given up when

- in some section of time the sizes still to be placed do not fit above the lowest offsets open to them: for each
  threshold t, ``t + sum of sizes with lowest offset >= t <= capacity`` (one machine with release dates; MiniMalloc's
  section inference is the smallest threshold alone);
- a buffer that was passed over at its lowest offset has nothing left to come that it could rest on;
- what remains splits into parts that share no time, and one of the parts has no solution, whatever the others do.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .tables import Ints, Tables

SOLVED, NO_SOLUTION, STOPPED = 1, 0, -1


# Columns of a frame of the search (one frame: one placement to be chosen).
_START, _COUNT, _NEXT, _MARK, _AMONG, _CHILDREN, _CHILD, _CEILING, _BEHIND = range(9)
# Kinds of entries of the trail: what a placement changed, to be taken back.
_LOWEST, _FLOOR, _PLACED = range(3)
_BIG = 1 << 62


@compiled
def _order_and_check(
    members: Ints, start: int, count: int, floor: Ints, floor_rank: Ints, capacity: int, latest: Ints, size: Ints,
    rank: Ints, neighbours_start: Ints, neighbours: Ints, first_section: Ints, last_section: Ints, offsets: Ints,
    lowest: Ints, load: Ints, release: Ints, blame: Ints,
) -> int:  # fmt: skip
    """Sort ``members[start:start + count]`` by (release, rank); -1 if they cannot fit, else 0.

    Release: the lowest offset that a buffer can still get.
    """
    begin, end = _BIG, -1
    for i in range(start, start + count):
        b = members[i]
        release[b] = max(lowest[b], floor[b])
        begin = min(begin, first_section[b])
        end = max(end, last_section[b])
    for i in range(start, start + count):
        b = members[i]
        if lowest[b] < floor[b] or (lowest[b] == floor[b] and rank[b] < floor_rank[b]):
            # Passed over at its lowest offset: something still to come must lie under it and in its way.
            support = _BIG
            for index in range(neighbours_start[b], neighbours_start[b + 1]):
                other = neighbours[index]
                if offsets[other] < 0:
                    bottom = max(lowest[other], floor[other])
                    if bottom < lowest[b] + size[b]:
                        support = min(support, bottom + size[other])
            if support + size[b] > capacity:
                for section in range(first_section[b], last_section[b] + 1):
                    blame[section] += 1
                return -1
            release[b] = max(release[b], support)
        if release[b] > latest[b]:
            for section in range(first_section[b], last_section[b] + 1):
                blame[section] += 1
            return -1
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
        # Without an early exit, so that it becomes vector code.
        stretch = load[first_section[b] : last_section[b] + 1]
        need, most = size[b], 0
        for k in range(stretch.size):
            stretch[k] += need
            most = max(most, stretch[k])
        if most > capacity - release[b]:
            for k in range(stretch.size):
                if stretch[k] > capacity - release[b]:
                    blame[first_section[b] + k] += 1
                    break
            return -1
    return 0


@compiled
def _valley(
    members: Ints, start: int, count: int, priority: Ints, size: Ints, first_section: Ints, last_section: Ints,
    lowest: Ints, load: Ints, release: Ints, ceiling: Ints, inside: Ints, valley: Ints, valley_start: int,
) -> int:  # fmt: skip
    """Choose the buffers among which the next placement is sought, and write them to ``valley[valley_start:]``.

    The valley around a buffer is the smallest set that has every buffer which could come to lie in the way of one of
    the set at its lowest offset. In a placement pushed down, the lowest of the set lies at its lowest offset: whatever
    could hold it up is in the set, and above it. The set is taken around the lowest buffer of the section of greatest
    priority (of all sections, if ``priority`` is empty). Returns the set's size; buffers keep the order of ``members``.
    """
    begin, end = _BIG, -1
    for i in range(start, start + count):
        b = members[i]
        begin = min(begin, first_section[b])
        end = max(end, last_section[b])
        inside[b] = 0
    seed = members[start]
    if priority.size > 0:
        at = begin
        for section in range(begin + 1, end + 1):
            if load[section] > 0 and priority[section] > priority[at]:
                at = section
        for i in range(start, start + count):
            b = members[i]
            if first_section[b] <= at <= last_section[b]:
                seed = b
                break
    for section in range(begin, end + 1):
        ceiling[section] = 0
    # Of each section the height up to which a buffer of the set could reach at its lowest offset.
    inside[seed] = 1
    for section in range(first_section[seed], last_section[seed] + 1):
        ceiling[section] = lowest[seed] + size[seed]
    grown = True
    while grown:
        grown = False
        for i in range(start, start + count):
            b = members[i]
            if inside[b] == 0:
                stretch = ceiling[first_section[b] : last_section[b] + 1]
                highest = 0
                for k in range(stretch.size):
                    highest = max(highest, stretch[k])
                if highest > release[b]:
                    inside[b] = 1
                    grown = True
                    top = lowest[b] + size[b]
                    for k in range(stretch.size):
                        stretch[k] = max(stretch[k], top)
    found = 0
    for i in range(start, start + count):
        if inside[members[i]] != 0:
            valley[valley_start + found] = members[i]
            found += 1
    return found


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
    members: Ints, capacity: int, latest: Ints, node_limit: int, size: Ints, alignment: Ints, rank: Ints,
    priority: Ints, neighbours_start: Ints, neighbours: Ints, first_section: Ints, last_section: Ints, offsets: Ints,
    lowest: Ints, crossing: Ints, trail: Ints, frames: Ints, nodes: Ints, stop: Ints, blame: Ints,
) -> int:  # fmt: skip
    """Depth-first search with its own stack (compiled recursive functions cannot be kept in numba's cache).

    ``members`` holds the root's buffers at its beginning and is the stack of all lists after them.
    """
    count = size.size
    release = np.zeros(count, np.int64)
    floor, floor_rank = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    load = np.zeros(blame.size, np.int64)
    valley = np.zeros((count + 2) * (count + 2), np.int64)
    inside, reach = np.zeros(count, np.int64), np.zeros(blame.size, np.int64)
    space = np.zeros(2, np.int64)
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
            frame[_MARK], frame[_NEXT] = trail_length, 0
            fits = _order_and_check(
                members, start, length, floor, floor_rank, capacity, latest, size, rank, neighbours_start, neighbours,
                first_section, last_section, offsets, lowest, load, release, blame,
            )  # fmt: skip
            if fits < 0:
                entering, result = False, 0
                depth -= 1
                continue
            frame[_AMONG] = _valley(
                members, start, length, priority, size, first_section, last_section, lowest, load, release, reach,
                inside, valley, among,
            )  # fmt: skip
            ceiling = _BIG
            for i in range(among, among + frame[_AMONG]):
                ceiling = min(ceiling, lowest[valley[i]] + size[valley[i]])
            frame[_CEILING] = ceiling
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
            depth += 1
            continue
        else:
            while trail_length > frame[_MARK]:
                trail_length -= 1
                b = trail[trail_length, 1]
                if trail[trail_length, 0] == _LOWEST:
                    lowest[b] = trail[trail_length, 2]
                elif trail[trail_length, 0] == _FLOOR:
                    floor[b], floor_rank[b] = trail[trail_length, 2], trail[trail_length, 3]
                else:
                    offsets[b] = -1
                    for section in range(first_section[b], last_section[b]):
                        crossing[section] += 1
        # Choose the next placement of this frame.
        chosen = frame[_NEXT]
        while chosen < frame[_AMONG]:
            b = valley[among + chosen]
            passed = lowest[b] < floor[b] or (lowest[b] == floor[b] and rank[b] < floor_rank[b])
            if not passed and lowest[b] < frame[_CEILING]:
                break
            chosen += 1
        if chosen == frame[_AMONG]:
            entering, result = False, 0
            depth -= 1
            continue
        frame[_NEXT] = chosen + 1
        b = valley[among + chosen]
        offset = lowest[b]
        offsets[b] = offset
        for i in range(among, among + frame[_AMONG]):
            other = valley[i]
            if other != b and (floor[other] < offset or (floor[other] == offset and floor_rank[other] < rank[b])):
                trail[trail_length, 0], trail[trail_length, 1] = _FLOOR, other
                trail[trail_length, 2], trail[trail_length, 3] = floor[other], floor_rank[other]
                trail_length += 1
                floor[other], floor_rank[other] = offset, rank[b]
        top = offset + size[b]
        for index in range(neighbours_start[b], neighbours_start[b + 1]):
            other = neighbours[index]
            if offsets[other] < 0 and lowest[other] < top:
                trail[trail_length, 0], trail[trail_length, 1], trail[trail_length, 2] = _LOWEST, other, lowest[other]
                trail_length += 1
                lowest[other] = -(-top // alignment[other]) * alignment[other]
        trail[trail_length, 0], trail[trail_length, 1] = _PLACED, b
        trail_length += 1
        cut = False
        for section in range(first_section[b], last_section[b]):
            crossing[section] -= 1
            cut = cut or crossing[section] == 0
        # Lists live on a stack: a frame's parts start behind every list that is still needed.
        behind = start + length if depth == 0 else max(start + length, frames[depth - 1, _BEHIND])
        position = start
        while members[position] != b:
            position += 1
        frame[_CHILDREN] = _split(members, start, length, position, behind, cut, first_section, crossing, space)
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
        priority: of each section: where the next placement is sought first; empty for the lowest anywhere.
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
    trail = np.empty((tables.neighbours.size + (count + 2) * (count + 2), 4), np.int64)
    nodes = np.zeros(1, np.int64)
    padded = capacity + int(tables.padding.max(initial=0))
    latest = capacity - tables.size + tables.padding
    status = _run(
        members, padded, latest, node_limit, tables.size, tables.alignment, rank, priority, tables.neighbours_start,
        tables.neighbours, tables.first_section, tables.last_section, offsets, np.zeros(count, np.int64),
        np.cumsum(crossing), trail, np.zeros((count + 2, 10), np.int64), nodes, stop, blame,
    )  # fmt: skip
    return status, offsets, int(nodes[0])
