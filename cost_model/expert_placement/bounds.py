"""What no placement can do better than: bounds on hops and on loads, each proven by itself, added with their
weights."""

from __future__ import annotations

import time

import numpy as np

from .balance import least_loads
from .problem import Floats, Ints, Problem
from .semidefinite import Semidefinite, by_rows
from .tables import device_of_expert

#: The semidefinite relaxation is begun where so many of its rounds fit the time.
_LEAST_ROUNDS = 15
_ROUNDS = 600
#: Rounds without a better bound after which it is given up.
_PATIENCE = 150


class Bounds:
    """Anytime: ``objective`` is the best bound so far on what all placements cost."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.total = float(problem.transitions.sum())
        self.loads = least_loads(problem)
        self.device = self.total - kept_by_rows(problem, problem.ranks)
        self.node = self.total - kept_by_rows(problem, problem.nodes) if problem.nodes > 1 else 0.0
        self.proven = -np.inf
        #: Of device hops and loads together, where they are bounded together.
        self.both = -np.inf

    @property
    def objective(self) -> float:
        weights = self.problem.weights
        hops, node = self.problem.weight_of_hops
        apart = hops * _up(self, self.device) + weights.load * float(self.loads.sum())
        return max(self.proven, max(self.both, apart) + node * _up(self, self.node))

    def relax(self, slots: Ints, known: float, deadline: float) -> None:
        """Semidefinite bounds on hops, beginning with a good placement, until ``known`` is proven or the time is up."""
        problem = self.problem
        if problem.replicated or problem.layers < 2:
            return
        device = device_of_expert(problem, slots)
        per_hop, per_node_hop = problem.weight_of_hops
        levels = []
        if per_hop:
            levels.append((problem.ranks, device))
        if per_node_hop:
            levels.append((problem.nodes, problem.node_of_rank[device]))
        for index, (groups, where) in enumerate(levels):
            until = time.perf_counter() + (deadline - time.perf_counter()) / (len(levels) - index)
            if groups == 1 or (problem.experts == groups and groups == 1):
                continue
            self._relax(groups, where, known, until)

    def _relax(self, groups: int, device: Ints, known: float, deadline: float) -> None:
        begin = time.perf_counter()
        if _seconds_a_round(self.problem) * _LEAST_ROUNDS > deadline - begin:
            return
        weighed = self._weighed_loads(device) if groups == self.problem.ranks else None
        relaxation = Semidefinite(self.problem.transitions, groups, device, weighed)
        improved = 0
        for number in range(0, _ROUNDS, 10):
            before = relaxation.bound
            hops = self.total - relaxation.run(10, deadline)
            if groups != self.problem.ranks:
                self.node = max(self.node, hops)
            elif weighed is None:
                self.device = max(self.device, hops)
            else:
                by_itself = np.where(weighed.any(axis=1), 0.0, self.loads)
                together = self.problem.weight_of_hops[0] * hops + self.problem.weights.load * float(by_itself.sum())
                self.both = max(self.both, together)
            if before - relaxation.bound > 1e-6 * before:
                improved = number
            # new inequalities first make the bound worse, until their prices are right
            stalled = number - improved > _PATIENCE
            if self.objective >= known * (1 - 1e-12) or stalled or time.perf_counter() >= deadline:
                break

    def _weighed_loads(self, device: Ints) -> Floats | None:
        """[layers, experts] loads in units of a hop, of the layers where the relaxation is likely to say more of the
        busiest device than the bound on loads does: with the loads that a good placement gives. None if there are none.
        """
        problem, (hop, _) = self.problem, self.problem.weight_of_hops
        held = np.zeros((problem.layers, problem.ranks))
        np.add.at(held, (np.arange(problem.layers)[:, None], device), problem.loads)
        total = np.maximum(held.sum(axis=1), 1e-300)
        chosen = (held**2).sum(axis=1) / total >= self.loads * (1 - 1e-12)
        weighed = np.where(chosen[:, None], problem.loads * (problem.weights.load / hop), 0.0)
        return weighed if weighed.any() else None


def _seconds_a_round(problem: Problem) -> float:
    """About, on one core of a usual machine: two eigenvalue decompositions' worth for each pair of layers."""
    return (problem.layers - 1) * 6e-10 * (2.0 * problem.experts) ** 3


def _up(bounds: Bounds, hops: float) -> float:
    """Hops are whole where all counts are."""
    whole = bool((bounds.problem.transitions == np.rint(bounds.problem.transitions)).all())
    return float(np.ceil(hops - 1e-6 - 1e-9 * abs(hops))) if whole else hops


def kept_by_rows(problem: Problem, places: int) -> float:
    """Tokens that no placement can keep more than: an expert with n places meets at most n times the slots of a place
    of the next layer's experts, and all experts together have no more places than there are slots."""
    if not problem.has_transitions:
        return 0.0
    room = problem.slots // places
    if not problem.replicated:
        return by_rows(problem.transitions, room)
    total = 0.0
    for counts in problem.transitions:
        total += min(_kept(counts, room, problem.slots, places), _kept(counts.T, room, problem.slots, places))
    return total


def _kept(counts: Floats, room: int, slots: int, places: int) -> float:
    """Concave in an expert's number of places, so that the best use of the spare slots is greedy."""
    experts = counts.shape[0]
    pieces = -(-experts // room)
    ordered = np.zeros((experts, pieces * room))
    ordered[:, :experts] = np.sort(counts, axis=1)[:, ::-1]
    chunk = ordered.reshape(experts, pieces, room).sum(axis=2)
    more = np.sort(chunk[:, 1:places].ravel())[::-1]
    return float(chunk[:, 0].sum() + more[: slots - experts].sum())
