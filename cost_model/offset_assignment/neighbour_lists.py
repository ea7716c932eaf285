"""Which buffers share time with which."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..compiled import compiled

_Ints = NDArray[np.int64]


@compiled
def neighbour_lists(lower: _Ints, upper: _Ints, by_lower: _Ints) -> tuple[_Ints, _Ints]:
    """(starts, list): the neighbours of buffer b are ``list[starts[b]:starts[b + 1]]``. O(pairs).

    ``by_lower``: the buffers in the order of ``lower``.
    """
    count = lower.size
    degree = np.zeros(count + 1, np.int64)
    for i in range(count):
        a = by_lower[i]
        for j in range(i + 1, count):
            b = by_lower[j]
            if lower[b] >= upper[a]:
                break
            degree[a + 1] += 1
            degree[b + 1] += 1
    start = np.cumsum(degree)
    fill = start[:-1].copy()
    lists = np.empty(start[count], np.int64)
    for i in range(count):
        a = by_lower[i]
        for j in range(i + 1, count):
            b = by_lower[j]
            if lower[b] >= upper[a]:
                break
            lists[fill[a]] = b
            fill[a] += 1
            lists[fill[b]] = a
            fill[b] += 1
    return start, lists
