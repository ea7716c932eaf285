"""The search with replicas, or with experts that must stay on their group's node: annealing of copies, in rounds."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

from ...logs import tell_gap
from .baselines import eplb_global, eplb_hierarchical
from .problem import Ints, Problem, costs
from .replicated import anneal_copies
from .search import timed, tiny
from .tables import slots_of_devices

ROUNDS, _STEPS, _DOUBLE = 40, 150, 5
_HOT, _COLD, _WARM = 0.3, 0.004, (0.05, 0.15, 0.02, 0.1)
_CHUNK = 20_000


class CopiesSearch:
    """Anytime: ``slots`` and ``objective`` are the best so far."""

    def __init__(self, problem: Problem, deadline: float, seed: int) -> None:
        self.problem, self.deadline, self.seed = problem, deadline, seed
        self.goal = -np.inf
        self._stop = False
        self.incoming = np.ascontiguousarray(problem.transitions.transpose(0, 2, 1))
        greedy = eplb_hierarchical(problem) if problem.grouped else eplb_global(problem)
        self.home = self._homes(greedy)
        self.slots, self.objective = greedy, self._objective(greedy)
        if problem.current is not None and (not problem.grouped or self._stays(problem.current)):
            self.offer(problem.current)
            if problem.grouped and problem.weights.migration:
                self.home = self._homes(problem.current)
                self.slots, self.objective = problem.current, self._objective(problem.current)
        between = max(problem.layers - 1, 1)
        self.unit = float(problem.transitions.sum()) * problem.weight_of_hops[0] / between / problem.experts
        self.unit += problem.weights.load * float(problem.loads.sum()) / problem.layers / problem.experts / 8
        self.unit = max(self.unit, 1e-9)

    def _homes(self, slots: Ints) -> Ints:
        """[layers, experts] the node of each expert's group, -1 without groups."""
        problem = self.problem
        if not problem.grouped or problem.nodes == 1:
            return np.full((problem.layers, problem.experts), -1, np.int64)
        held = problem.held(slots)
        return np.asarray(problem.node_of_rank[held.argmax(axis=1)], np.int64)

    def _stays(self, slots: Ints) -> bool:
        """Whether every group of a placement lies on one node, each node with as many groups."""
        problem = self.problem
        held = problem.held(slots).reshape(problem.layers, problem.nodes, -1, problem.experts).any(axis=2)
        by_group = held.reshape(problem.layers, problem.nodes, problem.groups, -1).any(axis=3)
        even = by_group.sum(axis=2) == problem.groups // problem.nodes
        return bool((by_group.sum(axis=1) == 1).all() and even.all())

    def _objective(self, slots: Ints) -> float:
        return costs(self.problem, slots).objective(self.problem.weights)

    @property
    def over(self) -> bool:
        return self.objective <= self.goal or time.perf_counter() >= self.deadline or self._stop

    def stop(self) -> None:
        """From another thread: end soon."""
        self._stop = True

    def offer(self, slots: Ints) -> None:
        objective = self._objective(slots)
        if objective < self.objective:
            self.slots, self.objective = slots.copy(), objective
            tell_gap("experts", objective, self.goal)

    def run(self, rounds: int = ROUNDS) -> None:
        for number in range(rounds):
            if self.over:
                return
            steps = (_STEPS * self.problem.layers * self.problem.slots) << min(number // _DOUBLE, 12)
            if number == 0:
                self.improve(self.slots, steps, 0.02, number)
                if self.problem.weight_of_hops[0] and not self.problem.grouped:
                    self.improve(self._from_single_copies(), steps, 0.1, number)
            else:
                self.improve(self.slots, steps, _HOT if number % 4 == 1 else _WARM[number % 4], number)

    def _from_single_copies(self) -> Ints:
        """The placement of one copy each that keeps most tokens; the rest of each device's slots is filled with what
        its neighbours' tokens go to most, and what is loaded most."""
        from .starts import reassign, sequential

        problem = self.problem
        room = -(-problem.experts // problem.ranks)
        padded = room * problem.ranks
        if padded > problem.slots:
            return self.slots
        transitions = np.zeros((problem.layers - 1, padded, padded))
        transitions[:, : problem.experts, : problem.experts] = problem.transitions
        loads = np.zeros((problem.layers, padded))
        loads[:, : problem.experts] = problem.loads
        single = Problem(loads, transitions, problem.ranks, problem.nodes)
        from .tables import device_of_expert

        device = reassign(single, device_of_expert(single, sequential(single)), 3)
        chosen = slots_of_devices(device).reshape(problem.layers, problem.ranks, room)
        slots = np.zeros((problem.layers, problem.ranks, problem.per_rank), np.int64)
        for layer in range(problem.layers):
            popular = np.argsort(-problem.loads[layer], kind="stable")
            spare = iter(np.tile(popular, problem.slots // problem.experts + 2).tolist())
            for rank in range(problem.ranks):
                own = [expert for expert in chosen[layer, rank].tolist() if expert < problem.experts]
                own += [next(spare) for _ in range(problem.per_rank - len(own))]
                slots[layer, rank] = own
        return slots.reshape(problem.layers, -1)

    def improve(self, slots: Ints, steps: int, hot: float, number: int) -> None:
        problem = self.problem
        state = self._state(slots)
        per_hop, per_node_hop = problem.weight_of_hops
        weights = (float(per_hop), float(per_node_hop), float(problem.weights.load), float(problem.weights.migration))
        if problem.current is None:
            weights = (*weights[:3], 0.0)
        seed = (self.seed * 1_000_003 + number) % (1 << 31)
        chunks = max(1, -(-steps // _CHUNK))
        ratio = (_COLD / hot) ** (1.0 / chunks) if hot > _COLD else 1.0
        for chunk in range(chunks):
            if self.over and chunk:
                break
            begin = hot * self.unit * ratio**chunk
            tables = problem.transitions, self.incoming, problem.loads, problem.node_of_rank, self.home
            cooling = steps // chunks, begin, begin * ratio, seed + chunk
            arguments: tuple[Any, ...] = (*state, *tables, *weights, *cooling)
            anneal_copies(*arguments)
        self.offer(state[0])

    def _state(self, slots: Ints) -> tuple[Any, ...]:
        problem = self.problem
        slots = np.ascontiguousarray(slots, np.int64).copy()
        held = np.ascontiguousarray(problem.held(slots).transpose(0, 2, 1))
        on_node = held.reshape(*held.shape[:2], problem.nodes, problem.ranks_per_node).sum(axis=3)
        current = problem.current_held
        used = np.zeros_like(held) if current is None else np.ascontiguousarray(current.transpose(0, 2, 1))
        return slots, held, _shared(held), on_node, _shared(on_node), held.sum(axis=2), used


def _shared(held: Ints) -> Ints:
    """[layers - 1, experts, experts] places where experts of consecutive layers both are."""
    present = (held > 0).astype(np.float32)
    shared = np.stack([a @ b.T for a, b in itertools.pairwise(present)]) if len(held) > 1 else None
    experts = held.shape[1]
    return np.zeros((0, experts, experts), np.int64) if shared is None else np.rint(shared).astype(np.int64)


def warm_up() -> float:
    """Compile, or load from the cache. Returns the seconds that it took."""

    def run() -> None:
        search = CopiesSearch(tiny(6), np.inf, 0)
        search.improve(search.slots, 10, 0.1, 0)

    return timed(run)
