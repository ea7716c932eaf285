"""ExFlow's placement (Yao et al., IPDPS 2024): its objective, hops between devices, by recursive bipartition.

The experts of every layer are halved by an integer program that cuts as few token steps as possible, each half again,
and so on until each part is a device's. The paper's program has a variable for each token; counts of equal steps make
it smaller without changing it. Loads are not looked at.
"""

from __future__ import annotations

import time

import numpy as np

from ...errors import PlacementError
from .problem import Ints, Problem
from .starts import reassign, sequential
from .tables import device_of_expert, slots_of_devices


def exflow(problem: Problem, seconds: float = 30.0) -> Ints:
    """[layers, slots]. ``seconds``: for all integer programs together; larger parts get more of them.

    Raises:
        PlacementError: experts are replicated, or the number of devices is not a power of two.
    """
    if problem.replicated or problem.ranks & (problem.ranks - 1):
        raise PlacementError(
            "recursive bipartition needs one copy of each expert and a power of two of devices",
            remedy="compare with other placements",
        )
    device = np.zeros((problem.layers, problem.experts), np.int64)
    levels = problem.ranks.bit_length() - 1
    for level in range(levels):
        parts = 1 << level
        halves = np.zeros_like(device)
        for part in range(parts):
            members = np.stack([np.flatnonzero(row == part) for row in device])
            np.put_along_axis(halves, members, _halve(problem, members, seconds / levels / parts), axis=1)
        device = 2 * device + halves
    return slots_of_devices(device)


def _halve(problem: Problem, members: Ints, seconds: float) -> Ints:
    """[layers, members] 0 or 1: the half of each member, as few steps between halves as the time allows to find."""
    from ortools.sat.python import cp_model

    begin = time.perf_counter()
    layers, width = members.shape
    counts = np.stack(
        [problem.transitions[i][np.ix_(members[i], members[i + 1])] for i in range(layers - 1)]
        or [np.zeros((width, width))]
    )[: layers - 1]
    part = Problem(np.ones((layers, width)), counts, 2)
    start = np.tile(np.arange(width) // (width // 2), (layers, 1))
    if layers > 1:
        start = reassign(part, device_of_expert(part, sequential(part)), 1)
    model = cp_model.CpModel()
    half = [[model.new_bool_var("") for _ in range(width)] for _ in range(layers)]
    for row, values in zip(half, start.tolist(), strict=True):
        model.add(sum(row) == width // 2)
        for variable, value in zip(row, values, strict=True):
            model.add_hint(variable, value)
    model.add(half[0][0] == int(start[0, 0]))  # the halves are alike
    terms = []
    for layer, i, j in np.argwhere(counts > 0).tolist():
        cut = model.new_bool_var("")
        model.add(cut >= half[layer][i] - half[layer + 1][j])
        model.add(cut >= half[layer + 1][j] - half[layer][i])
        model.add_hint(cut, bool(start[layer, i] != start[layer + 1, j]))
        terms.append(round(float(counts[layer, i, j])) * cut)
    model.minimize(sum(terms))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = max(0.1, seconds - (time.perf_counter() - begin))
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return start
    return np.array([[solver.value(variable) for variable in row] for row in half], np.int64)
