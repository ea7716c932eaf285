"""Anytime solver of offset assignment (dynamic storage allocation).

1. The bound: most bytes live at a time. Everything ends when the goal (the capacity asked for, else the bound) is met.
2. First fit and best fit in a portfolio of orders, for all buffers at once: in plain Python up to ``_PYTHON_BUFFERS``
   (and then some trials at other orders), compiled beyond. Parts that share no time (cuts where nothing is live) do not
   meet, so each keeps its own best.
3. For each part above the goal, the highest first: reinsertion search over orders, exact branch and bound with restarts
   (small parts; at a capacity that halves the distance to the bound), CP-SAT on windows of time.

Limits are counts of moves, nodes and restarts, in rounds that double; the clock only ends the whole. A run that ends by
itself is repeated exactly by its seed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ...logs import tell_gap
from .parts import Part, split
from .problem import Problem, Result
from .quick import first_fit, orders, reorder
from .tables import Ints

#: Up to so many buffers first fit in Python is quicker than loading compiled code.
_PYTHON_BUFFERS = 2000
#: Work of reordering in Python: trials times the square of the number of buffers; about a second at most.
_REORDER_STEPS = 5_000_000
#: Largest sum of sizes: offsets are 64-bit, and searches add a few of them.
LARGEST = 1 << 60


def solve(
    problem: Problem,
    capacity: int | None = None,
    *,
    time_limit: float = 10.0,
    seed: int = 0,
    tolerance: float = 0.0,
    worthwhile: float = 0.0,
) -> Result:
    """Place all buffers below ``capacity`` bytes, or as low as possible where none is given.

    Args:
        time_limit: seconds after which the best placement known is returned. The bound and a first placement are
            always made, and compiling, where it must be done (once on a machine), is not counted.
        seed: of everything drawn at random.
        tolerance: without a capacity, a height within this share of the bound is good enough to stop.
        worthwhile: the same, for loading compiled code to search with (a second; many, once, where it is not cached).
    """
    deadline = time.perf_counter() + time_limit
    bound = problem.lower_bound()
    if problem.has_gaps:
        from .gapped import solve_gapped

        return solve_gapped(problem, capacity, bound, deadline, seed)
    held = np.flatnonzero(problem.size)
    if held.size < problem.size.size:
        # Buffers without bytes fit anywhere.
        rest = solve(
            problem.only(held), capacity, time_limit=time_limit, seed=seed, tolerance=tolerance, worthwhile=worthwhile
        )
        offsets = np.zeros(problem.size.size, np.int64)
        offsets[held] = rest.offsets
        return replace(rest, offsets=offsets)
    tables = problem.tables
    goal = capacity if capacity is not None else int(bound * (1.0 + tolerance))
    parts = _greedy(problem, goal, deadline)
    _tell(parts, bound)
    infeasible = capacity is not None and bound > capacity
    for part in parts:
        if part.members.size <= _PYTHON_BUFFERS and part.height > max(goal, bound) and not infeasible:
            _reorder(part, max(goal, bound), seed)
    if capacity is None:
        goal = max(goal, int(bound * (1.0 + worthwhile)))
    # Imported where there is something to do: it loads compiled code.
    if any(part.height > max(goal, bound) for part in parts) and not infeasible:
        from .improvement import improve, warm_up

        deadline += warm_up()
    for part in sorted(parts, key=lambda part: -part.height):
        if infeasible or time.perf_counter() >= deadline:
            break
        if part.height > max(goal, bound):
            proven = improve(part, max(goal, bound), capacity is not None, deadline, seed)
            bound = max(bound, proven)
            _tell(parts, bound)
            infeasible = capacity is not None and proven > capacity
    offsets = np.zeros(tables.size.size, np.int64)
    for part in parts:
        offsets[part.members] = part.offsets
    height = tables.height(offsets)
    if infeasible:
        status = "infeasible"
    elif capacity is not None and height > capacity:
        status = "timeout"
    else:
        status = "optimal" if height <= bound else "feasible"
    solver = max(parts, key=lambda part: part.height).solver if parts else "no buffers"
    return Result(offsets, height, bound, status, solver)


def _tell(parts: Sequence[Part], bound: int) -> None:
    height = max((part.height for part in parts), default=0)
    tell_gap(f"offsets of {sum(part.members.size for part in parts)} buffers", height, bound, "{:.0f} bytes".format)


def _greedy(problem: Problem, goal: int, deadline: float) -> list[Part]:
    """The portfolio of orders; each part keeps the lowest placement that any order gave it."""
    tables = problem.tables
    parts: list[Part] = []
    for name, offsets in _placements(problem):
        if not parts:
            for members in split(tables):
                own, placed = tables.only(members), offsets[members]
                parts.append(Part(members, own, placed, own.height(placed), name))
        else:
            ends = offsets + tables.size - tables.padding
            for part in parts:
                height = int(ends[part.members].max())
                if height < part.height:
                    part.offsets, part.height, part.solver = offsets[part.members], height, name
        if max(part.height for part in parts) <= max(goal, tables.bound) or time.perf_counter() >= deadline:
            break
    return parts


def _reorder(part: Part, goal: int, seed: int) -> None:
    tables = part.tables
    columns = (tables.lower.tolist(), tables.upper.tolist(), tables.size.tolist(), tables.alignment.tolist())
    trials = min(200, _REORDER_STEPS // tables.size.size**2)
    height, offsets = reorder(part.offsets.tolist(), columns, tables.padding.tolist(), goal, trials, seed)
    if height < part.height:
        part.offsets, part.height, part.solver = np.array(offsets, np.int64), height, "reordered first fit"


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
