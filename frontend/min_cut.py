"""The minimum cut by which torch chooses what a backward recomputes, found in compiled code.

Torch's partitioner gives ``networkx.minimum_cut`` a graph of two nodes and a few edges for every op of the joint graph;
pure Python then takes seconds for a model of a hundred layers, whether they repeat or not. Here the same cut comes from
OR-Tools' push-relabel. Of all minimum cuts networkx gives the one nearest to the sink, which is unique, so that what is
saved and what is recomputed does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

#: Sums of capacities stay below this, so that the solver's 64-bit integers cannot overflow.
_LARGEST_SUM = 2**60


def minimum_cut(graph: Any, source: Any, sink: Any) -> tuple[float, tuple[set[Any], set[Any]]] | None:
    """Value and sides (source's, sink's) of the minimum cut of a networkx ``DiGraph`` with edge attribute ``capacity``.

    None where the caller has to take the slow way: capacities that are not whole numbers or too large, no finite cut,
    no OR-Tools.
    """
    try:
        from ortools.graph.python.max_flow import SimpleMaxFlow
    except ImportError:
        return None
    finite: list[tuple[Any, Any, int]] = []
    infinite: list[tuple[Any, Any]] = []
    for start, end, capacity in graph.edges(data="capacity", default=math.inf):
        if capacity == math.inf:
            infinite.append((start, end))
        elif capacity < 0 or capacity != int(capacity):
            return None
        elif capacity:
            finite.append((start, end, int(capacity)))
    total = sum(capacity for _, _, capacity in finite)
    if total >= _LARGEST_SUM:
        return None
    # What hangs on the source or the sink by infinite edges is on its side in every finite cut: one node each.
    above = _reachable(source, infinite)
    below = _reachable(sink, ((end, start) for start, end in infinite))
    if above & below:
        return None
    number = {node: 0 for node in above} | {node: 1 for node in below}
    solver = SimpleMaxFlow()
    for start, end, capacity in [*finite, *((start, end, total + 1) for start, end in infinite)]:
        first = number.setdefault(start, len(number) + 2)
        second = number.setdefault(end, len(number) + 2)
        if first != second and first != 1 and second != 0:
            solver.add_arc_with_capacity(first, second, capacity)
    if not solver.num_arcs():
        return 0, (set(graph) - below, below)
    if solver.num_nodes() < 2 or solver.solve(0, 1) != SimpleMaxFlow.OPTIMAL:
        return None
    lower = set(solver.get_sink_side_min_cut())
    beneath = {node for node, index in number.items() if index in lower} | below
    return solver.optimal_flow(), (set(graph) - beneath, beneath)


def _reachable(start: Any, edges: Iterable[tuple[Any, Any]]) -> set[Any]:
    following: dict[Any, list[Any]] = {}
    for before, after in edges:
        following.setdefault(before, []).append(after)
    found, waiting = {start}, [start]
    while waiting:
        for node in following.get(waiting.pop(), ()):
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found


def fast_minimum_cut(original: Callable[..., Any], active: Callable[[], bool]) -> Callable[..., Any]:
    """``networkx.minimum_cut`` that takes the fast way while ``active()`` and where it gives the same answer."""

    def minimum_cut_or_original(graph: Any, source: Any, sink: Any, *args: Any, **kwargs: Any) -> Any:
        if active() and not args and not kwargs:
            found = minimum_cut(graph, source, sink)
            if found is not None:
                return found
        return original(graph, source, sink, *args, **kwargs)

    return minimum_cut_or_original
