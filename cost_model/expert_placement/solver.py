"""Anytime solver of expert placement, with bounds.

- Loads alone (no transitions, or hops weigh nothing): each layer by itself, by CP-SAT where it is small, else
annealing;
  then sets of experts change devices so that hops and migrations fall at the same loads.
- Hops too: the search (search.py; with replicas or groups copies_search.py) runs in a thread beside the semidefinite
  bound; small problems are settled by columns.

Rounds are counted and every choice comes from the seed; the clock ends the whole.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np

from .balance import balance_layer
from .baselines import eplb_global, eplb_hierarchical
from .bounds import Bounds
from .problem import Ints, Problem, Result, Weights, costs
from .relabel import align, relabel

#: Share of the time after which the bound begins, with the best placement so far; least seconds for a bound.
_HEAD_START, _LEAST = 0.15, 1.0
#: Share of the time for the bound, where it does not run beside the search.
_FOR_THE_BOUND = 0.3
#: Rounds of the search before columns settle a small problem.
_BEFORE_COLUMNS = 8


def solve(problem: Problem, *, time_limit: float = 20.0, seed: int = 0) -> Result:
    """Place all experts.

    Args:
        time_limit: seconds after which the best placement known is returned; compiling, where it must be done (once on
            a machine), is not counted.
        seed: of everything drawn at random.
    """
    begin = time.perf_counter()
    bounds = Bounds(problem)
    if not any(problem.weight_of_hops) and not (problem.weights.migration and problem.current is not None):
        slots = _loads_alone(problem, bounds, begin + time_limit, seed)
        warm = 0.0
    elif problem.replicated or (problem.grouped and problem.nodes > 1):
        slots, warm = _with_copies(problem, bounds, begin + time_limit, seed)
    else:
        slots, warm = _without_copies(problem, bounds, begin + time_limit, seed)
    slots = align(problem, slots)
    found = costs(problem, slots)
    objective = found.objective(problem.weights)
    bound = min(bounds.objective, objective)
    return Result(slots, found, objective, bound, time.perf_counter() - begin - warm)


def _loads_alone(problem: Problem, bounds: Bounds, deadline: float, seed: int) -> Ints:
    start = eplb_hierarchical(problem) if problem.grouped else eplb_global(problem)
    if problem.current is not None and problem.weights.load == 0.0:
        start = problem.current
    slots = start.copy()
    if problem.weights.load:
        for layer in range(problem.layers):
            left = (deadline - time.perf_counter()) / (problem.layers - layer)
            found = balance_layer(problem, layer, start[layer], time.perf_counter() + left)
            slots[layer] = found.slots
            bounds.loads[layer] = max(bounds.loads[layer], found.bound)
        open_layers = costs(problem, slots).busiest > bounds.loads * (1 + 1e-9)
        if open_layers.any() and time.perf_counter() < deadline:
            slots = _annealed_loads(problem, slots, float(bounds.loads.sum()), deadline, seed)
    return relabel(problem, slots)


def _annealed_loads(problem: Problem, slots: Ints, goal: float, deadline: float, seed: int) -> Ints:
    from . import copies_search

    alone = replace(
        problem, transitions=np.zeros_like(problem.transitions), current=None, weights=Weights(0.0, 0.0, 1.0, 0.0)
    )
    deadline += copies_search.warm_up()
    search = copies_search.CopiesSearch(alone, deadline, seed)
    search.goal = goal * (1 + 1e-9)
    search.offer(slots)
    search.run()
    better = costs(alone, search.slots).busiest < costs(alone, slots).busiest
    return np.where(better[:, None], search.slots, slots)


def _with_copies(problem: Problem, bounds: Bounds, deadline: float, seed: int) -> tuple[Ints, float]:
    from .copies_search import CopiesSearch, warm_up

    warm = warm_up()
    deadline += warm
    left = deadline - time.perf_counter()
    relaxed = not problem.replicated and left >= _LEAST
    search = CopiesSearch(problem, deadline - (_FOR_THE_BOUND * left if relaxed else 0.0), seed)
    search.goal = bounds.objective * (1 + 1e-12)
    search.run()
    if relaxed:  # without the groups, which only narrows the choice
        bounds.relax(search.slots, search.objective, deadline)
    return search.slots, warm


def _without_copies(problem: Problem, bounds: Bounds, deadline: float, seed: int) -> tuple[Ints, float]:
    from .columns import Columns, fits
    from .search import ROUNDS, Search, warm_up

    warm = warm_up()
    deadline += warm
    begin = time.perf_counter()
    search = Search(problem, deadline, seed)
    search.goal = bounds.objective * (1 + 1e-12)
    if fits(problem):
        search.run(_BEFORE_COLUMNS)
        if not search.over:
            columns = Columns(problem, search.slots, bounds.loads)
            columns.run(deadline)
            search.offer(np.argsort(columns.device, axis=1, kind="stable"))
            kept = problem.weight_of_hops[0] * bounds.total
            bounds.proven = max(bounds.proven, kept - columns.limit)
        return search.slots, warm
    if deadline - begin < _LEAST:
        search.run()
        return search.slots, warm
    thread = threading.Thread(target=search.run, args=(ROUNDS,), daemon=True)
    thread.start()
    thread.join(_HEAD_START * (deadline - begin))
    bounds.relax(search.slots, search.objective, deadline)
    search.goal = bounds.objective * (1 + 1e-12)
    thread.join(max(0.0, deadline - time.perf_counter()))
    search.stop()
    thread.join()
    return search.slots, warm
