"""The search without replicas: annealing from placements made layer by layer, then chains of swaps, in rounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ...logs import tell_gap
from .annealing import anneal
from .baselines import round_robin
from .chains import improve_by_chains
from .problem import Floats, Ints, Problem, costs
from .starts import reassign, sequential
from .tables import Tables, device_of_expert, slots_of_devices, tables

#: Rounds in all; steps of the first, per expert of a layer; every so many rounds they double.
ROUNDS, _STEPS, _DOUBLE = 24, 1500, 2
#: First and last temperature of a round from a fresh start, and first of one from the best so far, in units of the
#: tokens that an expert passes on.
_HOT, _COLD, _WARM = 0.15, 0.02, (0.06, 0.1, 0.04, 0.08)
#: Steps between two looks at the clock.
_CHUNK = 400_000
_SWEEPS = 60


class Search:
    """Anytime: ``slots`` and ``objective`` are the best so far."""

    def __init__(self, problem: Problem, deadline: float, seed: int) -> None:
        self.problem, self.deadline, self.seed = problem, deadline, seed
        self.incoming = np.ascontiguousarray(problem.transitions.transpose(0, 2, 1))
        self.slots = round_robin(problem) if problem.current is None else problem.current
        self.objective = self._objective(self.slots)
        self.goal = -np.inf
        self._stop = np.zeros(1, np.int64)
        between = max(problem.layers - 1, 1)
        self.unit = float(problem.transitions.sum()) * problem.weight_of_hops[0] / between / problem.experts
        self.unit += problem.weights.load * float(problem.loads.sum()) / problem.layers / problem.experts / 8
        self.unit = max(self.unit, 1e-9)

    def _objective(self, slots: Ints) -> float:
        return costs(self.problem, slots).objective(self.problem.weights)

    @property
    def over(self) -> bool:
        return self.objective <= self.goal or time.perf_counter() >= self.deadline or bool(self._stop[0])

    def stop(self) -> None:
        """From another thread: end soon."""
        self._stop[0] = 1

    def offer(self, slots: Ints) -> None:
        objective = self._objective(slots)
        if objective < self.objective:
            self.slots, self.objective = slots.copy(), objective
            tell_gap("experts", objective, self.goal)

    def run(self, rounds: int = ROUNDS) -> None:
        for number in range(rounds):
            if self.over:
                return
            self.round(number)

    def round(self, number: int) -> None:
        """One start or the best so far, annealed and improved by chains."""
        problem = self.problem
        steps = (_STEPS * problem.layers * problem.experts) << min(number // _DOUBLE, 12)
        fresh = number % 2 == 0
        if number == 0 and problem.current is not None:
            # near the placement in use first: few migrations
            self.improve(self.slots, number)
        if fresh:
            start = self._start(number)
            self.offer(start)
            self._improve(start, steps, _HOT, number)
        else:
            self._improve(self.slots, steps, _WARM[number % len(_WARM)], number)

    def improve(self, slots: Ints, number: int) -> None:
        """Downhill from a placement, by chains alone."""
        self._improve(slots, 0, 0.0, number)

    def descend(self, seconds: float) -> Ints:
        """Downhill from the best placement by chains alone, for so long: the clock ends a sweep wherever it is."""
        state = tables(self.problem, self.slots)
        timer = threading.Timer(seconds, self.stop)
        timer.start()
        try:
            self._chains(state, self._arguments(), self.seed)
        finally:
            timer.cancel()
        return state.slots

    def _start(self, number: int) -> Ints:
        problem = self.problem
        if not problem.weight_of_hops[0]:
            return self.slots
        first = (0, problem.layers // 2, problem.layers - 1, problem.layers // 4)[number % 4]
        device = device_of_expert(problem, sequential(problem, first))
        return slots_of_devices(reassign(problem, device, 2))

    def _improve(self, slots: Ints, steps: int, hot: float, number: int) -> None:
        state = tables(self.problem, slots)
        shared = self._arguments()
        seed = (self.seed * 1_000_003 + number) % (1 << 31)
        chunks = max(1, -(-steps // _CHUNK))
        ratio = (_COLD / hot) ** (1.0 / chunks) if hot else 1.0
        for chunk in range(chunks if steps else 0):
            if self.over:
                break
            begin = hot * self.unit * ratio**chunk
            cooling = steps // chunks, begin, begin * ratio, seed + chunk
            arguments: tuple[Any, ...] = (state.slots, state.pull, state.load, *shared, *cooling)
            anneal(*arguments)
        self._chains(state, shared, seed)
        self.offer(state.slots)

    def _chains(self, state: Tables, shared: tuple[Any, ...], seed: int) -> None:
        """Sweep by sweep, so that the clock is looked at."""
        for sweep in range(_SWEEPS):
            if self.over and sweep:
                break
            limits = 1, seed + sweep, self._stop
            arguments: tuple[Any, ...] = (state.slots, state.pull, state.load, *shared, *limits)
            if improve_by_chains(*arguments) <= 0.0:
                break

    def _arguments(self) -> tuple[Any, ...]:
        problem = self.problem
        per_hop, per_node_hop = problem.weight_of_hops
        return (
            problem.transitions, self.incoming, problem.loads, problem.node_of_rank,
            float(per_hop), float(per_node_hop), float(problem.weights.load),
        )  # fmt: skip


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes: of compiling, where that must be done."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def warm_up() -> float:
    """Compile, or load from the cache. Returns the seconds that it took."""

    def run() -> None:
        problem = tiny(4)
        search = Search(problem, np.inf, 0)
        search._improve(search.slots, 10, 0.1, 0)

    return timed(run)


def tiny(slots: int) -> Problem:
    """Two layers of four experts on two devices."""
    transitions: Floats = np.arange(16, dtype=np.float64).reshape(1, 4, 4)
    loads = np.stack([transitions[0].sum(axis=1), transitions[0].sum(axis=0)])
    return Problem(loads, transitions, 2, slots=slots)
