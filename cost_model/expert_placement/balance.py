"""Load of the busiest device of one layer: what none can stay under, and the least there is, by CP-SAT."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .problem import Floats, Ints, Problem

#: Most variables of CP-SAT's model (copies x devices); beyond, the bound is the one made by hand.
MOST_VARIABLES = 60_000
#: CP-SAT sees loads as integers: whole ones exactly, up to this sum.
_DIGITS = 1 << 46


def least_load(load: Floats, slots: int, ranks: int) -> float:
    """A load that the busiest of ``ranks`` devices cannot stay under, ``slots`` slots shared equally between them.

    The mean (rounded up, where nothing is replicated and loads are whole); the least t for which an expert's copies,
    each at most t, fit the slots; and, without replicas, that some device holds k + 1 of the k * ranks + 1 heaviest.
    """
    bound = float(load.sum()) / ranks
    if slots > load.size:
        return max(bound, _least_copy(load, slots))
    if (load == np.rint(load)).all():
        bound = float(-(-int(load.sum()) // ranks))
    heavy = np.sort(load)[::-1]
    room = slots // ranks
    light = np.concatenate([[0.0], np.cumsum(heavy[::-1])])
    for k in range(room):
        # of the k * ranks + 1 heaviest, k + 1 share a device; the rest of its slots hold at least the lightest
        shared = heavy[k * ranks - k : k * ranks + 1].sum() if k else heavy[0]
        bound = max(bound, float(shared + light[room - k - 1]))
    return bound


def _least_copy(load: Floats, slots: int) -> float:
    """The least t such that ceil(load / t) copies of each expert fit the slots."""
    most = slots - load.size + 1
    values = np.unique(load[load > 0][:, None] / np.arange(1, most + 1))
    low, high = 0, values.size - 1
    while low < high:
        middle = (low + high) // 2
        copies = np.maximum(np.ceil(load / values[middle] * (1 - 1e-12)), 1)
        if copies.sum() <= slots:
            high = middle
        else:
            low = middle + 1
    return float(values[low]) if values.size else 0.0


def least_loads(problem: Problem) -> Floats:
    """``least_load`` of each layer."""
    return np.array([least_load(load, problem.slots, problem.ranks) for load in problem.loads])


@dataclass(frozen=True)
class Balanced:
    """A layer's slots with the load of its busiest device, and what no placement can stay under."""

    slots: Ints
    busiest: float
    bound: float


def balance_layer(problem: Problem, layer: int, slots: Ints, deadline: float) -> Balanced:
    """The placement of one layer that loads its busiest device least, beginning with ``slots``."""
    load = problem.loads[layer]
    start = busiest_load(problem, load, slots)
    floor = least_load(load, problem.slots, problem.ranks)
    found = Balanced(slots, start, floor)
    if start <= floor * (1 + 1e-12) or not load.any():
        return Balanced(slots, start, start)
    nodes = problem.nodes if problem.grouped else 1
    most = (problem.slots - problem.experts) // nodes + 1
    if problem.experts * most * problem.ranks > MOST_VARIABLES or time.perf_counter() >= deadline:
        return found
    return _by_integers(problem, load, slots, found, most, deadline)


def busiest_load(problem: Problem, load: Floats, slots: Ints) -> float:
    copies = np.bincount(slots, minlength=problem.experts)
    return float(np.bincount(problem.device_of_slot, (load / np.maximum(copies, 1))[slots]).max())


def _by_integers(problem: Problem, load: Floats, slots: Ints, known: Balanced, most: int, deadline: float) -> Balanced:
    """Variables: does expert e have n copies; how many of these lie on device d; where grouped, is group g on a
    node."""
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        return known
    experts, ranks, nodes = problem.experts, problem.ranks, problem.nodes
    copies_known = np.bincount(slots, minlength=experts)
    held = problem.held(slots[None, :])[0]
    unit = _unit(load, most)
    model = cp_model.CpModel()
    where: dict[tuple[int, int], list[cp_model.IntVar]] = {}
    on_device: list[list[tuple[cp_model.IntVar, int]]] = [[] for _ in range(ranks)]
    for e in range(experts):
        has = [model.new_bool_var("") for _ in range(most)]
        model.add_exactly_one(has)
        for n, chosen in enumerate(has, start=1):
            here = [model.new_int_var(0, min(n, problem.per_rank), "") for _ in range(ranks)]
            model.add(sum(here) == n * chosen)
            where[e, n] = here
            model.add_hint(chosen, bool(copies_known[e] == n))
            share = int(load[e] / (n * unit))
            for rank, variable in enumerate(here):
                on_device[rank].append((variable, share))
                model.add_hint(variable, int(held[rank, e]) if copies_known[e] == n else 0)
    if problem.grouped and nodes > 1:
        _stay_in_groups(problem, model, where, held)
    top = model.new_int_var(int(known.bound / unit), int(known.busiest / unit) + 1, "")
    for items in on_device:
        model.add(sum(variable for variable, _ in items) == problem.per_rank)
        model.add(sum(share * variable for variable, share in items) <= top)
    model.minimize(top)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.linearization_level = 2  # half the time of the usual 1
    solver.parameters.max_time_in_seconds = max(0.01, deadline - time.perf_counter())
    status = solver.solve(model)
    bound = max(known.bound, float(solver.best_objective_bound) * unit)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Balanced(known.slots, known.busiest, min(bound, known.busiest))
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for (e, _), here in where.items():
        for rank, variable in enumerate(here):
            rows[rank] += [e] * solver.value(variable)
    made = np.array([sorted(row) for row in rows], np.int64).ravel()
    busiest = busiest_load(problem, load, made)
    if busiest > known.busiest:
        made, busiest = known.slots, known.busiest
    # shares are rounded down: what is proven for them is so for the true loads, up to a unit for each slot of a device
    if status == cp_model.OPTIMAL and busiest - bound <= (problem.per_rank + 1) * unit:
        bound = busiest
    return Balanced(made, busiest, min(bound, busiest))


def _stay_in_groups(problem: Problem, model: Any, where: dict[tuple[int, int], list[Any]], held: Ints) -> None:
    size = problem.experts // problem.groups
    for group in range(problem.groups):
        members = range(group * size, (group + 1) * size)
        lies = [model.new_bool_var("") for _ in range(problem.nodes)]
        model.add_exactly_one(lies)
        home = int(problem.node_of_rank[np.argmax(held[:, group * size] > 0)])
        for node, variable in enumerate(lies):
            model.add_hint(variable, node == home)
        for (e, n), here in where.items():
            if e in members:
                for rank, variable in enumerate(here):
                    model.add(variable <= n * lies[int(problem.node_of_rank[rank])])


def _unit(load: Floats, most: int) -> float:
    """What loads are counted in: exactly, where copies up to ``most`` divide whole loads and the sums stay small."""
    whole = bool((load == np.rint(load)).all())
    multiple = int(np.lcm.reduce(np.arange(1, most + 1))) if most <= 20 else 0
    total = max(float(load.sum()), 1e-300)
    if whole and multiple and total * multiple < _DIGITS:
        return 1.0 / multiple
    return total / (1 << 40)
