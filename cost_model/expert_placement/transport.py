"""Exact assignment with capacities (a transportation problem), by OR-Tools' minimum-cost flow."""

from __future__ import annotations

import numpy as np

from .problem import Floats, Ints

#: Values are scaled to integers below this.
_RANGE = 1 << 40


def assign(value: Floats, capacity: int) -> Ints:
    """For each row of ``value`` the column it goes to, at most ``capacity`` rows a column, so that the sum of values is
    the largest. Without OR-Tools (it has no build for this Python) greedily."""
    rows, columns = value.shape
    try:
        from ortools.graph.python import min_cost_flow
    except ImportError:
        return _greedy(value, capacity)
    span = float(np.abs(value).max()) or 1.0
    whole = bool((value == np.rint(value)).all()) and span < _RANGE
    cost = -np.rint(value if whole else value * (_RANGE / span)).astype(np.int64)
    flow = min_cost_flow.SimpleMinCostFlow()
    left = np.repeat(np.arange(rows), columns)
    right = rows + np.tile(np.arange(columns), rows)
    arcs = flow.add_arcs_with_capacity_and_unit_cost(left, right, np.ones(rows * columns, np.int64), cost.ravel())
    sink = rows + columns
    flow.add_arcs_with_capacity_and_unit_cost(
        rows + np.arange(columns),
        np.full(columns, sink),
        np.full(columns, capacity, np.int64),
        np.zeros(columns, np.int64),
    )
    flow.set_nodes_supplies(np.append(np.arange(rows), sink), np.append(np.ones(rows, np.int64), -rows))
    if flow.solve() != flow.OPTIMAL:
        return _greedy(value, capacity)
    return np.asarray(np.asarray(flow.flows(arcs), np.int64).reshape(rows, columns).argmax(axis=1), np.int64)


def _greedy(value: Floats, capacity: int) -> Ints:
    rows, columns = value.shape
    chosen = np.full(rows, -1, np.int64)
    room = [capacity] * columns
    for code in np.argsort(-value, axis=None, kind="stable").tolist():
        row, column = divmod(code, columns)
        if chosen[row] < 0 and room[column]:
            chosen[row] = column
            room[column] -= 1
    return chosen
