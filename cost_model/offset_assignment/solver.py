"""Anytime solver of offset assignment (dynamic storage allocation).

1. The bound: most bytes live at a time. Everything ends when the goal (the capacity asked for, else the bound) is met.
2. First fit and best fit in a portfolio of orders, for all buffers at once: in plain Python up to ``_PYTHON_BUFFERS``,
   compiled beyond. Parts that share no time (cuts where nothing is live) do not meet, so each keeps its own best.
3. For each part above the goal, the highest first: reinsertion search over orders, exact branch and bound with restarts
   (small parts; at a capacity that halves the distance to the bound), CP-SAT on windows of time.

Limits are counts of moves, nodes and restarts, in rounds that double; the clock only ends the whole. A run that ends by
itself is repeated exactly by its seed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from .parts import Part, split
from .problem import Problem, Result
from .quick import first_fit, orders
from .tables import Ints, Tables

#: Up to so many buffers first fit in Python is quicker than loading compiled code.
_PYTHON_BUFFERS = 2000
#: Largest sum of sizes: offsets are 64-bit, and searches add a few of them.
LARGEST = 1 << 60


def solve(
    problem: Problem,
    capacity: int | None = None,
    *,
    time_limit: float = 10.0,
    seed: int = 0,
    tolerance: float = 0.0,
) -> Result:
    """Place all buffers below ``capacity`` bytes, or as low as possible where none is given.

    Args:
        time_limit: seconds after which the best placement known is returned. The bound and a first placement are
            always made.
        seed: of everything drawn at random.
        tolerance: without a capacity, a height within this share of the bound is good enough to stop.
    """
    deadline = time.perf_counter() + time_limit
    bound = problem.lower_bound()
    if problem.has_gaps:
        from .gapped import solve_gapped

        return solve_gapped(problem, capacity, bound, deadline, seed)
    granule = problem.granule
    if capacity is not None:
        goal = -(-capacity // granule) * granule
    else:
        goal = int(problem.tables.section_load.max(initial=0) * (1.0 + tolerance))
    parts = _greedy(problem, goal, deadline)
    proven = int(problem.tables.section_load.max(initial=0))
    infeasible = capacity is not None and bound > capacity
    # Imported where there is something to do: it loads compiled code.
    if any(part.height > max(goal, proven) for part in parts) and not infeasible:
        from .improvement import improve
    for part in sorted(parts, key=lambda part: -part.height):
        if infeasible or time.perf_counter() >= deadline:
            break
        reached = max(goal, proven)
        if part.height > reached:
            lowest = improve(part, reached, capacity is not None, granule, deadline, seed)
            if capacity is not None and lowest > goal:
                infeasible = True
            proven = max(proven, min(lowest, part.height))
    offsets = np.zeros(problem.size.size, np.int64)
    for part in parts:
        offsets[part.members] = part.offsets
    height = problem.height(offsets)
    worst = max(parts, key=lambda part: part.height, default=None)
    rounded = worst.height if worst is not None else 0
    if proven > int(problem.tables.section_load.max(initial=0)):
        # Proven for sizes rounded up: a buffer at the top may be shorter by less than a granule.
        bound = max(bound, proven - (granule - 1))
    if infeasible:
        status = "infeasible"
    elif capacity is not None and height > capacity:
        status = "timeout"
    else:
        status = "optimal" if height <= bound or (granule > 1 and rounded <= proven) else "feasible"
    return Result(offsets, height, min(bound, height), status, worst.solver if worst is not None else "empty")


def _greedy(problem: Problem, goal: int, deadline: float) -> list[Part]:
    """The portfolio of orders; each part keeps the lowest placement that any order gave it."""
    tables = problem.tables
    parts: list[Part] = []
    for name, offsets in _placements(problem):
        if not parts:
            for members in split(tables):
                own = Tables(*(c[members] for c in (tables.lower, tables.upper, tables.size, tables.alignment)))
                placed = offsets[members]
                height = int((placed + own.size).max())
                parts.append(Part(members, own, int(own.section_load.max()), placed, height, name))
        else:
            ends = offsets + tables.size
            for part in parts:
                height = int(ends[part.members].max())
                if height < part.height:
                    part.offsets, part.height, part.solver = offsets[part.members], height, name
        highest = max(part.height for part in parts)
        if highest <= max(goal, max(part.bound for part in parts)) or time.perf_counter() >= deadline:
            break
    return parts


def _placements(problem: Problem) -> Iterator[tuple[str, Ints]]:
    """(name, offsets) of one order of the portfolio after the other."""
    tables = problem.tables
    count = tables.size.size
    if count == 0:
        return
    contention = tables.contention()
    if problem.hint is not None and (problem.hint >= 0).any():
        order = np.lexsort((tables.size, problem.hint))
    else:
        order = np.zeros(0, np.int64)
    if count <= _PYTHON_BUFFERS:
        columns = [column.tolist() for column in (tables.lower, tables.upper, tables.size, tables.alignment)]
        given = [("hints", order.tolist())] if order.size else []
        for name, each in [*given, *orders(columns[0], columns[1], columns[2], contention.tolist())]:
            yield f"first fit ({name})", np.array(first_fit(each, *columns)[1], np.int64)
        return
    from .greedy import place

    if order.size:
        yield "first fit (hints)", place(tables, order)[1]
    length, size = -tables.length, -tables.size
    area = -tables.size.astype(np.float64) * tables.length
    keys: list[tuple[str, tuple[np.ndarray[tuple[int], np.dtype[np.generic]], ...]]] = [
        ("contention, lifetime", (size, length, -contention)),
        ("contention, size", (length, size, -contention)),
        ("size, lifetime", (length, size)),
        ("lifetime, size", (size, length)),
        ("contention, area", (area, -contention)),
        ("area", (area,)),
    ]
    for name, columns_ in keys:
        by_key = np.lexsort((tables.lower, *columns_))
        yield f"first fit ({name})", place(tables, by_key)[1]
        yield f"best fit ({name})", place(tables, by_key, best=True)[1]
