"""Proof of the optimum for small problems, by columns: all sets of experts that one device can hold.

A column is a path: for each layer the set of experts of one device. A placement is ``ranks`` paths that together hold
every expert of every layer once. The linear relaxation of this choice (column_relaxation.py) is far closer to the
optimum than one over single experts. When the gap that is left is small, every path that a better placement could use
can be listed, and CP-SAT chooses among them; that settles it.

Where too many paths are left, the problem is parted, best bound first. The busiest device's load of a layer, z, lies in
an interval ``floor <= z <= cap`` (sets heavier than the cap are not allowed), which is halved; or two experts of a
layer are together on a device in one part and apart in the other.

Column generation: Gilmore and Gomory 1961; together or apart: Ryan and Foster 1981; listing columns within the gap:
Baldacci, Christofides and Mingozzi 2008.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from dataclasses import dataclass, field

import numpy as np

from .column_relaxation import Bound, Relaxation
from .problem import Flags, Floats, Ints, Problem
from .tables import device_of_expert

#: Most sets of a layer, and most pairs of sets over all layers, that are looked at; most paths that CP-SAT gets.
MOST_SETS, MOST_PAIRS, MOST_PATHS = 5000, 40_000_000, 8_000
#: CP-SAT's deterministic time (its own unit, about a second) for one choice; the problem is parted where it is not
#: enough.
_EFFORT = 3.0
#: Loads above their floor are halved when not paying them is worth this share of the gap; else experts are separated.
_UNPAID = 0.25
#: Share of the worth below which two values are the same.
_SAME = 1e-9


def fits(problem: Problem) -> bool:
    """Whether the sets of a device are few enough, and all devices alike."""
    if problem.replicated or problem.layers < 2 or problem.ranks < 2 or problem.weight_of_hops[1]:
        return False
    if problem.grouped and problem.nodes > 1:
        return False
    if problem.current is not None and problem.weights.migration:
        return False
    sets = math.comb(problem.experts, problem.per_rank)
    return sets <= MOST_SETS and sets * sets * (problem.layers - 1) <= MOST_PAIRS


@dataclass(order=True)
class _Part:
    """Some of all placements. ``value``: none of them is worth more. ``floor``, ``cap``: [layers] interval of the
    busiest load; ``barred``: [layers, sets] not allowed."""

    key: float
    number: int
    value: float = field(compare=False)
    floor: Floats = field(compare=False)
    cap: Floats = field(compare=False)
    barred: Flags = field(compare=False)
    prices: Floats = field(compare=False)


class Columns:
    """The search. Worth is ``hops weight * tokens kept - load weight * sum of busiest loads``; ``worth`` and ``device``
    [layers, experts] are the best placement's, ``limit`` what none can exceed."""

    def __init__(self, problem: Problem, slots: Ints, floor: Floats) -> None:
        """``floor``: [layers] loads that no placement's busiest device can stay under."""
        self.problem, self.floor = problem, floor
        self.relaxation = Relaxation(problem)
        self.per_load = problem.weights.load
        self.limit = math.inf
        self.worth = -math.inf
        self.offer(device_of_expert(problem, slots))
        self._number = itertools.count()

    def offer(self, device: Ints) -> None:
        """A placement that is known, as a start and to be better than."""
        self.relaxation.remember(device)
        worth = self._worth(device)
        if worth > self.worth:
            self.worth, self.device = worth, device

    def _busiest(self, device: Ints) -> Floats:
        one_hot = device[:, :, None] == np.arange(self.problem.ranks)
        return np.asarray(np.einsum("le,ler->lr", self.problem.loads, one_hot).max(axis=1))

    def _worth(self, device: Ints) -> float:
        same = device[:-1, :, None] == device[1:, None, :]
        kept = self.problem.weight_of_hops[0] * float((self.problem.transitions * same).sum())
        return kept - self.per_load * float(self._busiest(device).sum())

    @property
    def _tolerance(self) -> float:
        return _SAME * max(1.0, abs(self.worth), float(self.relaxation.gains.max(initial=0.0)))

    def run(self, deadline: float) -> bool:
        """Search until the optimum is proven (True) or the time is up. ``limit`` holds in both cases."""
        layers, sets = self.relaxation.loads.shape
        root = _Part(
            -math.inf, next(self._number), math.inf, self.floor, np.full(layers, np.inf),
            np.zeros((layers, sets), np.bool_), np.zeros((layers, self.problem.experts)),
        )  # fmt: skip
        heap = [root]
        unsettled = -math.inf
        while heap:
            part = heapq.heappop(heap)
            self.limit = max(unsettled, part.value)
            if part.value <= self.worth + self._tolerance:
                break
            if time.perf_counter() >= deadline:
                self.limit = max(self.limit, self.worth)
                return False
            parts = self._settle(part, deadline)
            if parts is None:
                unsettled = max(unsettled, part.value)
            for child in parts or ():
                heapq.heappush(heap, child)
        self.limit = max(self.worth, unsettled)
        return unsettled <= self.worth + self._tolerance

    def _settle(self, part: _Part, deadline: float) -> list[_Part] | None:
        """What is left of a part: nothing if it is done, None if the time is up."""
        usual = self._busiest(self.device)
        goal = self.worth + self._tolerance
        bound = self.relaxation.bound(part.value, part.floor, usual, part.barred, part.prices, goal, deadline)
        part.value, part.prices = min(part.value, bound.value), bound.prices
        gap = part.value - self.worth
        if gap <= self._tolerance:
            return []
        if time.perf_counter() >= deadline:
            return None
        if self.per_load:
            part.cap = np.minimum(part.cap, part.floor + gap / self.per_load)
            part.barred = part.barred | (self.relaxation.loads > part.cap[:, None] * (1 + 1e-12))
            bound.table[part.barred] = np.inf
        paths = self.relaxation.listed(bound, gap + self._tolerance, MOST_PATHS)
        if paths is not None and self._choose(paths, part, deadline):
            return []
        return self._by_load(part, bound, gap) or self._by_pair(part, bound)

    def _by_load(self, part: _Part, bound: Bound, gap: float) -> list[_Part] | None:
        """Halve the interval of the layer whose load the relaxed solution pays least of, if that is worth it."""
        if not self.per_load or bound.heaviest is None:
            return None
        unpaid = self.per_load * (np.minimum(bound.heaviest, part.cap) - part.floor)
        layer = int(np.argmax(unpaid))
        if unpaid[layer] < _UNPAID * gap:
            return None
        load, low = self.relaxation.loads[layer], part.floor[layer]
        middle = low + 0.5 * (min(bound.heaviest[layer], part.cap[layer]) - low)
        heavier = load[load > middle]
        if heavier.size == 0:
            return None
        above = float(heavier.min())
        cap, floor = part.cap.copy(), part.floor.copy()
        cap[layer], floor[layer] = middle, above
        barred = part.barred.copy()
        barred[layer] |= load > middle
        value = part.value  # the floor may have been paid for by the relaxation already
        return [
            _Part(-value, next(self._number), value, part.floor, cap, barred, part.prices),
            _Part(-value, next(self._number), value, floor, part.cap, part.barred, part.prices),
        ]

    def _by_pair(self, part: _Part, bound: Bound) -> list[_Part] | None:
        """Two experts of a layer that the relaxed solution has together about half the time: together, and apart."""
        if bound.together is None:
            return None
        share = np.minimum(bound.together, 1.0 - bound.together)
        layer, one, two = np.unravel_index(int(share.argmax()), share.shape)
        if share[layer, one, two] < 1e-6:
            return None
        both = self.relaxation.sets[:, one] + self.relaxation.sets[:, two]
        children = []
        for wrong in (both == 1.0, both == 2.0):
            barred = part.barred.copy()
            barred[layer] |= wrong
            children.append(
                _Part(-part.value, next(self._number), part.value, part.floor, part.cap, barred, part.prices)
            )
        return children

    def _choose(self, paths: Ints, part: _Part, deadline: float) -> bool:
        """The best placement made of some paths, by CP-SAT; True when it is certain that there is no better."""
        from ortools.sat.python import cp_model

        layers, experts = self.problem.layers, self.problem.experts
        sets, gains = self.relaxation.sets, self.relaxation.gains
        model = cp_model.CpModel()
        use = [model.new_bool_var("") for _ in range(len(paths))]
        for layer in range(layers):
            for expert in range(experts):
                holding = np.flatnonzero(sets[paths[:, layer], expert])
                if holding.size == 0:
                    return True
                model.add_exactly_one([use[index] for index in holding.tolist()])
        worth = np.sum([gains[i, paths[:, i], paths[:, i + 1]] for i in range(layers - 1)], axis=0)
        loads = self.per_load * self.relaxation.loads[np.arange(layers)[None, :], paths]  # [paths, layers]
        floor = self.per_load * part.floor
        unit = _unit([worth, loads], abs(self.worth))
        terms = [round(float(value) / unit) * variable for value, variable in zip(worth, use, strict=True)]
        if self.per_load:
            for layer in range(layers):
                scaled = np.rint(loads[:, layer] / unit).astype(np.int64)
                low = int(floor[layer] / unit)
                busiest = model.new_int_var(low, max(low, int(scaled.max())), "")
                for value, variable in zip(scaled.tolist(), use, strict=True):
                    if value > low:
                        model.add(busiest >= value).only_enforce_if(variable)
                terms.append(-busiest)
        model.add(sum(terms) >= math.floor(self.worth / unit))
        model.maximize(sum(terms))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.max_deterministic_time = _EFFORT
        solver.parameters.max_time_in_seconds = max(0.01, deadline - time.perf_counter())
        status = solver.solve(model)
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            device = np.zeros((layers, experts), np.int64)
            for rank, index in enumerate(index for index, variable in enumerate(use) if solver.value(variable)):
                for layer in range(layers):
                    device[layer, sets[paths[index, layer]] > 0] = rank
            self.offer(device)
        return bool(status in (cp_model.OPTIMAL, cp_model.INFEASIBLE))


def _unit(values: list[Floats], scale: float) -> float:
    """What to divide by so that integers hold the values exactly if they are whole, else to 12 digits."""
    if all((each == np.rint(each)).all() for each in values):
        return 1.0
    return max(scale, 1.0) * 1e-12
