"""The searches that make one part of a problem lower, in rounds that double. Loads compiled code."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np

from .parts import Part
from .reinsertion import reinsert
from .restarts import NO_SOLUTION, SOLVED, Restarts
from .tables import Ints, Tables
from .windows import improve_window

#: Up to so many buffers in a part for the reinsertion search and for exact search.
_REINSERTION_BUFFERS, _EXACT_BUFFERS = 5000, 700
#: Most pairs of buffers that share time for which lists of neighbours are made (8 bytes each, twice).
_MOST_PAIRS = 20_000_000
#: Moves, restarts and windows of the first round; each later round has twice as many.
_MOVES, _RESTARTS, _WINDOWS = 2000, 16, 4
_ROUNDS = 14
#: After which round, counted from 0, a search for a given capacity looks at capacities above it too.
_NEAR_ROUND = 3
#: Exact search that came within this share of the goal is left to go on alone; and for some rounds where it found
#: anything.
_NEAR, _EXACT_ROUNDS = 1.02, 3


def improve(part: Part, goal: int, given: bool, deadline: float, seed: int) -> int:
    """Search a part until its height is at most ``goal``. Returns a height that is proven to be needed.

    ``given``: the goal is all that is asked for, there is no merit in coming near it.
    """
    tables = part.tables
    count = tables.size.size
    lowest = tables.bound
    if _pairs(tables) > _MOST_PAIRS:
        return lowest
    exact = Restarts(tables, seed) if count <= _EXACT_BUFFERS else None
    order = np.argsort(part.offsets, kind="stable").astype(np.int64)

    def done() -> bool:
        return part.height <= max(goal, lowest) or time.perf_counter() >= deadline

    for number in range(_ROUNDS):
        if done():
            break
        if exact is not None:
            lowest = max(lowest, _exact_round(part, exact, max(goal, lowest), not given, number, deadline))
            if given and lowest > goal:
                break
            if given and number == _NEAR_ROUND and not done():
                # In case the capacity is never met, get near it.
                _exact_round(part, exact, max(goal, lowest), True, 0, deadline)
            alone = part.solver == "exact search" and number < _EXACT_ROUNDS
            if given or alone or part.height <= _NEAR * goal:
                continue
        if not done() and count <= _REINSERTION_BUFFERS:
            with alarm(deadline) as stop:
                moves = max(100, (_MOVES << number) * 500 // max(count, 500))
                _, offsets = reinsert(tables, order, max(goal, lowest), moves, seed + number, stop)
            height = tables.height(offsets)
            if height < part.height:
                part.offsets, part.height, part.solver = offsets, height, "reinsertion"
        for index in range(_WINDOWS << number):
            if done():
                break
            generator = np.random.default_rng((seed, number, index))
            windowed = improve_window(tables, part.offsets, generator, deadline)
            if windowed is None:
                break
            if windowed is not part.offsets:
                height = tables.height(windowed)
                part.offsets, part.height, part.solver = windowed, height, "windows"
    return lowest


def warm_up() -> float:
    """Load the compiled searches, or compile them where that has not been done on this machine. Returns seconds."""
    begin = time.perf_counter()
    lower, size = np.array([0, 0, 1], np.int64), np.array([1, 2, 1], np.int64)
    tables = Tables(lower, lower + 2, size, np.ones(3, np.int64), np.zeros(3, np.int64))
    reinsert(tables, np.arange(3, dtype=np.int64), tables.bound, 1, 0, np.zeros(1, np.int64))
    Restarts(tables, 0).run(tables.bound, 2, begin + 600)
    return time.perf_counter() - begin


def _exact_round(part: Part, exact: Restarts, goal: int, bisect: bool, number: int, deadline: float) -> int:
    """Try the goal, then, if ``bisect``, capacities half way between what failed and what is known, until they meet.

    Returns a height that is proven to be needed.
    """
    unit = part.tables.unit
    proven, failed, capacity = 0, 0, goal
    while part.height > goal and time.perf_counter() < deadline:
        status, offsets = exact.run(capacity, _RESTARTS << number, deadline)
        if status == SOLVED:
            part.offsets, part.height, part.solver = offsets, part.tables.height(offsets), "exact search"
        else:
            failed = capacity
            if status == NO_SOLUTION:
                proven = (capacity // unit + 1) * unit
            if not bisect:
                break
        capacity = (failed + (part.height - failed) // 2) // unit * unit
        if part.height - failed <= unit or capacity <= max(failed, goal):
            break
    return proven


def _pairs(tables: Tables) -> int:
    """Number of pairs of buffers that share time."""
    begins = np.sort(tables.lower)
    return int((np.searchsorted(begins, tables.upper) - np.arange(1, begins.size + 1)).sum()) if begins.size else 0


@contextlib.contextmanager
def alarm(deadline: float) -> Iterator[Ints]:
    """An array whose element turns 1 at the deadline: compiled searches, which hold no lock, look at it."""
    stop = np.zeros(1, np.int64)
    timer = threading.Timer(max(0.0, deadline - time.perf_counter()), stop.fill, (1,))
    timer.daemon = True
    timer.start()
    try:
        yield stop
    finally:
        timer.cancel()
