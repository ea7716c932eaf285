"""Placement that follows drifting loads: estimates over a window of batches, and steps that change only what pays."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from .problem import Floats, Ints, Problem, Result, costs
from .relabel import align
from .solver import solve


def choose(problem: Problem, hysteresis: float, *, time_limit: float, seed: int = 0) -> Result:
    """``solve``, but the placement in use is kept where what replaces it is worth less than a share ``hysteresis`` of
    the objective."""
    result = solve(problem, time_limit=time_limit, seed=seed)
    if problem.current is None or not hysteresis:
        return result
    kept = costs(problem, problem.current)
    objective = kept.objective(problem.weights)
    if result.objective > (1.0 - hysteresis) * objective:
        return Result(problem.current, kept, objective, result.bound, result.seconds)
    return result


@dataclass
class LoadEstimate:
    """Loads and transitions over the last ``window`` batches, exactly: each batch is added once and taken off once."""

    layers: int
    experts: int
    window: int
    loads: Floats = field(init=False)
    transitions: Floats = field(init=False)
    _batches: deque[tuple[Floats, Floats]] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        self.loads = np.zeros((self.layers, self.experts))
        self.transitions = np.zeros((self.layers - 1, self.experts, self.experts))

    def add(self, loads: Floats, transitions: Floats) -> None:
        """Count one batch, and forget the one that leaves the window."""
        self._batches.append((loads, transitions))
        self.loads += loads
        self.transitions += transitions
        if len(self._batches) > self.window:
            old_loads, old_transitions = self._batches.popleft()
            self.loads -= old_loads
            self.transitions -= old_transitions


class Replanner:
    """Keeps a placement in step with the loads.

    Each step takes about ``seconds``, looks for a better placement near the one in use and changes to it only if it is
    worth a share ``hysteresis`` of the objective, migrations counted. ``problem``: ranks, slots and weights; its loads
    and its current placement are where it begins.
    """

    def __init__(self, problem: Problem, window: int, hysteresis: float = 0.02, seconds: float = 0.1) -> None:
        if problem.current is None:
            raise ValueError("the problem has no current placement")
        self.problem, self.hysteresis, self.seconds = problem, hysteresis, seconds
        self.slots: Ints = problem.current
        self.estimate = LoadEstimate(problem.layers, problem.experts, window)
        self.steps = 0
        #: Seconds that a step takes once its search is over.
        self._after = 0.0

    def step(self, loads: Floats, transitions: Floats) -> Result:
        """Count a batch and go on to a better placement, if there is one that pays. ``seconds`` of the result include
        everything but compiling."""
        begin = time.perf_counter()
        self.estimate.add(loads, transitions)
        problem = replace(
            self.problem, loads=self.estimate.loads, transitions=self.estimate.transitions, current=self.slots
        )
        slots, warm = self._improved(problem, begin + self.seconds - self._after)
        searched = time.perf_counter()
        kept, found = costs(problem, self.slots), costs(problem, slots)
        before, after = kept.objective(problem.weights), found.objective(problem.weights)
        if after <= (1.0 - self.hysteresis) * before:
            self.slots = align(problem, slots)
        else:
            found, after = kept, before
        self.steps += 1
        end = time.perf_counter()
        self._after = max(end - searched, 0.9 * self._after)
        return Result(self.slots, found, after, -np.inf, end - begin - warm)

    def _improved(self, problem: Problem, deadline: float) -> tuple[Ints, float]:
        """A placement near the one in use, and the seconds that compiled code took to load."""
        begin = time.perf_counter()
        from . import copies_search, search

        copied = problem.replicated or (problem.grouped and problem.nodes > 1)
        if self.steps == 0:
            (copies_search if copied else search).warm_up()
        warm = time.perf_counter() - begin
        deadline += warm
        if not copied:
            descent = search.Search(problem, deadline, self.steps)
            return descent.descend(max(0.01, deadline - time.perf_counter())), warm
        copies = copies_search.CopiesSearch(problem, deadline, self.steps)
        copies.offer(self.slots)
        copies.improve(self.slots, 20 * problem.layers * problem.slots, 0.01, self.steps)
        return copies.slots, warm
