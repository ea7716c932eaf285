"""Large-neighbourhood search: free what lives in a window of time under a peak, and place it anew by CP-SAT."""

from __future__ import annotations

import time

import numpy as np

from .tables import Ints, Tables

#: Buffers freed by one window, and CP-SAT's deterministic time (its own unit, about a second) for it.
_FREED, _EFFORT = (20, 70), 1.0


def improve_window(tables: Tables, offsets: Ints, generator: np.random.Generator, deadline: float) -> Ints | None:
    """Try to lower one of the buffers that end at the height, without raising any to it.

    Returns:
        The new offsets, ``offsets`` itself where the window has nothing better, or None where OR-Tools is missing
        (it has no build for this Python) and windows cannot be searched.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        return None
    ends = offsets + tables.size
    height = int(ends.max())
    peak = int(generator.choice(np.flatnonzero(ends == height)))
    freed = _window(tables, peak, int(generator.integers(*_FREED)), generator)
    around = np.unique(
        np.concatenate([tables.neighbours[tables.neighbours_start[b] : tables.neighbours_start[b + 1]] for b in freed])
    )
    around = around[~np.isin(around, freed)]
    unit = int(np.gcd.reduce(np.concatenate([tables.size, tables.alignment[freed], offsets[around], [height]])))
    unit = max(unit, 1)

    model = cp_model.CpModel()
    top = model.new_int_var(0, height // unit - 1, "top")
    model.minimize(top)
    lives, places, offset_of = [], [], {}
    for b in freed.tolist():
        size, step = int(tables.size[b]) // unit, int(tables.alignment[b]) // unit
        if step > 1:
            quotient = model.new_int_var(0, height // unit // step, "")
            offset = model.new_int_var(0, height // unit, "")
            model.add(offset == quotient * step)
        else:
            offset = model.new_int_var(0, max(height // unit - size, 0), "")
        offset_of[b] = offset
        model.add(offset + size <= top)
        model.add_hint(offset, int(offsets[b]) // unit)
        places.append(model.new_fixed_size_interval_var(offset, size, ""))
        lives.append(model.new_fixed_size_interval_var(int(tables.lower[b]), int(tables.length[b]), ""))
    for b in around.tolist():
        places.append(model.new_fixed_size_interval_var(int(offsets[b]) // unit, int(tables.size[b]) // unit, ""))
        lives.append(model.new_fixed_size_interval_var(int(tables.lower[b]), int(tables.length[b]), ""))
    model.add_no_overlap_2d(lives, places)

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = int(generator.integers(1 << 30))
    solver.parameters.max_deterministic_time = _EFFORT
    solver.parameters.max_time_in_seconds = max(0.01, deadline - time.perf_counter())
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return offsets
    result = offsets.copy()
    for b, variable in offset_of.items():
        result[b] = solver.value(variable) * unit
    return result


def _window(tables: Tables, peak: int, count: int, generator: np.random.Generator) -> Ints:
    """About ``count`` buffers, the peak's among them, that meet the narrowest window around a time of its life."""
    middle = int(generator.integers(tables.lower[peak], tables.upper[peak]))
    distance = np.maximum(0, np.maximum(tables.lower - middle, middle - tables.upper + 1))
    nearest = np.argsort(distance + generator.random(distance.size), kind="stable")[:count]
    return np.unique(np.append(nearest, peak)).astype(np.int64)
