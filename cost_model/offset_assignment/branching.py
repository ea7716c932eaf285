"""Where the search branches: valleys, the candidates in them, and parts that share no time."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .releases import BIG, passed_over
from .tables import Ints


@compiled
def _dominated(
    b: int, size: Ints, alignment: Ints, latest: Ints, rank: Ints, neighbours_start: Ints, neighbours: Ints,
    first_section: Ints, last_section: Ints, offsets: Ints, lowest: Ints,
) -> bool:  # fmt: skip
    """Whether ``b``, at its lowest offset, stands on one buffer of the same sections that comes after it in rank.

    The two can change places without a change for any other, so one of the two orders is enough.
    """
    under = -1
    for index in range(neighbours_start[b], neighbours_start[b + 1]):
        a = neighbours[index]
        if offsets[a] >= 0 and offsets[a] + size[a] == lowest[b]:
            if under >= 0 or first_section[a] != first_section[b] or last_section[a] != last_section[b]:
                return False
            under = a
    if under < 0 or rank[under] < rank[b] or alignment[under] != alignment[b]:
        return False
    # The lower one must be allowed to end where the upper one does (it may have less padding).
    if latest[under] + size[under] < latest[b] + size[b]:
        return False
    return bool(size[under] % alignment[b] == 0 and size[b] % alignment[b] == 0)


@compiled
def choose_valley(
    members: Ints, start: int, count: int, capacity: int, priority: Ints, size: Ints, alignment: Ints, latest: Ints,
    rank: Ints, neighbours_start: Ints, neighbours: Ints, first_section: Ints, last_section: Ints, offsets: Ints,
    lowest: Ints, floor: Ints, floor_rank: Ints, release: Ints, load: Ints, inside: Ints, work: Ints, valley: Ints,
    at: int, blame: Ints,
) -> tuple[int, int]:  # fmt: skip
    """Choose the buffers among which the next placement is sought, and write them to ``valley[at:]``.

    A *valley* is a set with every buffer that could hold up one of the set at its lowest offset: z holds up x if it
    can begin below the top that x has there, and x fits above z. (The set is closed in the graph of "can hold up"; a
    smallest one is a strongly connected component that no edge leaves.) In a packing pushed down, the lowest of the
    set lies at its lowest offset: whatever could hold it up is in the set, and above it. Those whose lowest offset is
    not below the least top in the set cannot be the lowest, so it does not matter what holds them up.

    Of all valleys that one is taken with the fewest candidates: members neither passed over, nor above the least top,
    nor so high that their sections overflow. Among equals the one with the section of greatest priority. Without
    priorities it is the valley around the lowest release, wherever it is.

    Returns:
        (size of the valley, number of candidates); the candidates come first, in the order of ``members``.
    """
    for i in range(start, start + count):
        inside[members[i]] = 0
    fewest, best_weight, best_size, best_number, best_height = BIG, -1, 0, 0, 0
    number = 0
    for i in range(start, start + count):
        if inside[members[i]] != 0:
            continue
        number += 1
        work[0] = members[i]
        inside[members[i]] = number
        height = lowest[members[i]] + size[members[i]]
        done, found, closed = 0, 1, True
        while done < found and closed:
            x = work[done]
            done += 1
            if lowest[x] >= height:
                continue
            top, last = lowest[x] + size[x], latest[x]
            for index in range(neighbours_start[x], neighbours_start[x + 1]):
                z = neighbours[index]
                if offsets[z] < 0 and release[z] < top and release[z] + size[z] <= last and inside[z] != number:
                    if inside[z] != 0:
                        # It leads into a set seen before: that one is smaller.
                        closed = False
                        break
                    inside[z] = number
                    work[found] = z
                    found += 1
                    height = min(height, lowest[z] + size[z])
        if not closed:
            continue
        candidates, weight = 0, 0
        for j in range(found):
            b = work[j]
            sections = range(np.uint64(first_section[b]), np.uint64(last_section[b] + 1))
            if priority.size > 0:
                for section in sections:
                    weight = max(weight, priority[section])
            if candidates <= fewest and lowest[b] < height and not passed_over(b, rank, floor, floor_rank, lowest):
                most = 0
                for section in sections:
                    most = max(most, load[section])
                if lowest[b] + most <= capacity:
                    candidates += 1
        if candidates < fewest or (candidates == fewest and weight > best_weight):
            fewest, best_weight, best_size, best_number, best_height = candidates, weight, found, number, height
            if fewest <= 1 or priority.size == 0:
                break
    head, tail = at, at + best_size
    for i in range(start, start + count):
        b = members[i]
        if inside[b] != best_number:
            continue
        candidate = lowest[b] < best_height and not passed_over(b, rank, floor, floor_rank, lowest)
        if candidate:
            for section in range(first_section[b], last_section[b] + 1):
                if lowest[b] + load[section] > capacity:
                    blame[section] += 1
                    candidate = False
                    break
        if candidate and not _dominated(
            b, size, alignment, latest, rank, neighbours_start, neighbours, first_section, last_section, offsets, lowest
        ):
            valley[head] = b
            head += 1
        else:
            tail -= 1
            valley[tail] = b
    return best_size, head - at


@compiled
def split_members(
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
    begin, end = BIG, -1
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
