"""The linear relaxation over columns: paths of sets of experts, one device each. See columns.py.

Its bound holds for any prices ``u`` of experts and any shares ``s`` of the load's weight: ``sum of u + ranks * best
path's (tokens kept - its prices - its excess) - what all placements pay``. The load z of a layer's busiest device is at
least ``t + sum over devices of max(0, load - t) / (ranks - 1)`` for every t from the mean on, since no more than
``ranks - 1`` devices are above t and none above z; the shares say how much of the weight is put on which t.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

import numpy as np

from .paths import best_prefixes, best_suffixes, enumerate_paths
from .problem import Flags, Floats, Ints, Problem

Path = tuple[int, ...]
#: Rounds of pricing, and paths added in each.
_ROUNDS, _ADDED = 200, 40
#: How much of the best prices so far is kept when new ones are tried.
_SMOOTHING = 0.6
#: Where between its floor and the best placement's value a load is measured: the t above.
_LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8)


@dataclass
class Bound:
    """``value``: no placement is worth more. ``prices``: [layers, experts]; ``table``: [layers, sets] what a path pays
    for a set; ``together``: [layers, experts, experts] share of the relaxed solution in which two experts are on one
    device; ``heaviest``: [layers] of the sets that it uses."""

    value: float
    prices: Floats
    table: Floats
    together: Floats | None = None
    heaviest: Floats | None = None


class Relaxation:
    """All sets of a device, what pairs of them keep, and the paths found so far."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        members = np.array(list(itertools.combinations(range(problem.experts), problem.per_rank)), np.int64)
        self.sets = np.zeros((len(members), problem.experts))
        np.put_along_axis(self.sets, members, 1.0, axis=1)
        per_hop = problem.weight_of_hops[0]
        self.gains = np.stack([per_hop * (self.sets @ counts @ self.sets.T) for counts in problem.transitions])
        self.loads = problem.loads @ self.sets.T
        self.per_load = problem.weights.load
        self.paths: dict[Path, None] = {}

    def remember(self, device: Ints) -> None:
        """The paths of a placement, [layers, experts], as columns to begin with."""
        for rank in range(self.problem.ranks):
            match = (device == rank).astype(np.float64) @ self.sets.T
            self.paths[tuple(match.argmax(axis=1).tolist())] = None

    def bound(
        self, known: float, floor: Floats, usual: Floats, barred: Flags, prices: Floats, goal: float, deadline: float
    ) -> Bound:
        """Column generation until the relaxation is solved, or a value of at most ``goal`` is proven.

        Args:
            known: a bound that holds already.
            floor: [layers] the busiest load is at least this. ``usual``: what it is in a good placement.
            barred: [layers, sets] that are not allowed.
            prices: [layers, experts] to begin with; zeros if there are none.
        """
        pricing = _Pricing(self, floor, usual, barred)
        result = Bound(known, prices, pricing.table(prices, pricing.first_shares))
        if prices.any():
            pricing.evaluate(prices, pricing.first_shares, result)
        master = _Master(self, pricing)
        for path in self.paths:
            if pricing.allows(path):
                master.add(path)
        shares = pricing.first_shares
        for _ in range(_ROUNDS):
            if result.value <= goal or time.perf_counter() >= deadline or not master.solve():
                break
            dual, dual_shares = master.duals()
            if result.value - master.value <= 1e-7 * max(1.0, abs(master.value)):
                break
            new = 0
            kept = _SMOOTHING if result.prices.any() else 0.0
            while True:
                at = kept * result.prices + (1.0 - kept) * dual, kept * shares + (1.0 - kept) * dual_shares
                if pricing.evaluate(*at, result):
                    shares = at[1]
                for path in pricing.best_paths(_ADDED):
                    if path not in self.paths and pricing.reduced(path, dual, dual_shares) > 0.0:
                        self.paths[path] = None
                        master.add(path)
                        new += 1
                if new or kept == 0.0:
                    break
                kept = 0.0
            if new == 0:
                break
        if result.value > goal and master.solve():
            self._describe(result, master.shares_of_paths())
        return result

    def _describe(self, result: Bound, relaxed: list[tuple[Path, float]]) -> None:
        """What to branch on, from the shares of the paths in the relaxed solution."""
        layers = np.arange(self.problem.layers)
        weight = np.zeros(self.loads.shape)
        for path, share in relaxed:
            if share > 1e-9:
                weight[layers, path] += share
        result.together = np.einsum("ls,si,sj->lij", weight, self.sets, self.sets, optimize=True)
        result.heaviest = np.where(weight > 1e-6, self.loads, 0.0).max(axis=1)

    def listed(self, bound: Bound, gap: float, most: int) -> Ints | None:
        """All paths, [paths, layers], that a placement worth more than ``bound.value - gap`` may use; None if they are
        more than ``most``."""
        prefix, came = np.empty(bound.table.shape), np.empty(bound.table.shape, np.int64)
        best_prefixes(self.gains, bound.table, prefix, came)
        best = float(prefix[-1].max())
        if best == -math.inf:
            return np.empty((0, self.problem.layers), np.int64)
        suffix = np.empty(bound.table.shape)
        best_suffixes(self.gains, bound.table, suffix)
        found = enumerate_paths(self.gains, bound.table, suffix, best - gap, most)
        return None if found.shape[1] == 0 else found


class _Pricing:
    """Paths and bounds at given prices, within one part of all placements."""

    def __init__(self, relaxation: Relaxation, floor: Floats, usual: Floats, barred: Flags) -> None:
        self.relaxation = relaxation
        problem = relaxation.problem
        self.ranks = problem.ranks
        self.barred = barred
        self.levels = floor[:, None] + np.maximum(usual - floor, 0.0)[:, None] * np.array(_LEVELS)
        above = np.maximum(relaxation.loads[:, :, None] - self.levels[:, None, :], 0.0)
        self.excess = above / max(problem.ranks - 1, 1)  # [layers, sets, levels]
        self.over_floor = self.levels - floor[:, None]
        self.paid = relaxation.per_load * float(floor.sum())
        self.first_shares = np.zeros(self.levels.shape)
        self.first_shares[:, 0] = relaxation.per_load
        self.prefix = np.empty(barred.shape)
        self.came: Ints = np.empty(barred.shape, np.int64)

    def allows(self, path: Path) -> bool:
        return not any(row[chosen] for row, chosen in zip(self.barred, path, strict=True))

    def table(self, prices: Floats, shares: Floats) -> Floats:
        table = prices @ self.relaxation.sets.T + np.einsum("lst,lt->ls", self.excess, shares)
        table[self.barred] = np.inf
        return np.asarray(table)

    def evaluate(self, prices: Floats, shares: Floats, result: Bound) -> bool:
        """The best path of each end at these prices; True if their bound is the best so far, then in ``result``."""
        table = self.table(prices, shares)
        best_prefixes(self.relaxation.gains, table, self.prefix, self.came)
        best = float(self.prefix[-1].max())
        value = -math.inf
        if best > -math.inf:
            fixed = self.paid + float((shares * self.over_floor).sum())
            value = float(prices.sum()) + self.ranks * best - fixed
        if value < result.value or not result.prices.any():
            result.value, result.prices, result.table = min(value, result.value), prices, table
            return True
        return False

    def best_paths(self, number: int) -> list[Path]:
        ends = np.argsort(-self.prefix[-1], kind="stable")[:number]
        paths = []
        for end in ends.tolist():
            if self.prefix[-1, end] == -np.inf:
                break
            path = [end]
            for layer in range(self.came.shape[0] - 1, 0, -1):
                path.append(int(self.came[layer, path[-1]]))
            paths.append(tuple(reversed(path)))
        return paths

    def kept(self, path: Path) -> float:
        gains = self.relaxation.gains
        return sum(float(gain[one, two]) for gain, one, two in zip(gains, path, path[1:], strict=False))

    def reduced(self, path: Path, prices: Floats, shares: Floats) -> float:
        """Above zero if the path would better the relaxed solution with these duals."""
        sets = self.relaxation.sets
        price = sum(
            float(prices[layer] @ sets[chosen] + shares[layer] @ self.excess[layer, chosen])
            for layer, chosen in enumerate(path)
        )
        worth = self.kept(path)
        return worth - price - 1e-9 * max(1.0, abs(worth))


class _Master:
    """The relaxation over the paths known so far, solved by CLP in OR-Tools (GLOP gives up on some)."""

    def __init__(self, relaxation: Relaxation, pricing: _Pricing) -> None:
        from ortools.linear_solver import pywraplp

        self.relaxation, self.pricing = relaxation, pricing
        self.layers, self.experts = relaxation.problem.layers, relaxation.problem.experts
        self.solver = pywraplp.Solver.CreateSolver("CLP")
        self.optimal = pywraplp.Solver.OPTIMAL
        infinity = self.solver.infinity()
        self.objective = self.solver.Objective()
        self.objective.SetMaximization()
        self.rows = [self.solver.Constraint(1.0, 1.0) for _ in range(self.layers * self.experts)]
        # in units of the best gain and of a device's mean load, for the solver's tolerances
        self.unit = max(float(relaxation.gains.max(initial=0.0)), 1e-300)
        self.load_unit = max(float(relaxation.loads.max(initial=0.0)), 1e-300)
        dear = 2.0 * self.layers
        for row in self.rows:  # an expert may also stay unplaced, at a price that no placement pays
            self.objective.SetCoefficient(slack := self.solver.NumVar(0.0, infinity, ""), -dear)
            row.SetCoefficient(slack, 1.0)
        self.level_rows = []
        if relaxation.per_load:
            for over in pricing.over_floor:
                busiest = self.solver.NumVar(0.0, infinity, "")
                self.objective.SetCoefficient(busiest, -relaxation.per_load * self.load_unit / self.unit)
                rows = [self.solver.Constraint(float(value) / self.load_unit, infinity) for value in over]
                for row in rows:
                    row.SetCoefficient(busiest, 1.0)
                self.level_rows.append(rows)
        self.columns: list[tuple[Path, object]] = []

    def add(self, path: Path) -> None:
        variable = self.solver.NumVar(0.0, self.solver.infinity(), "")
        self.columns.append((path, variable))
        self.objective.SetCoefficient(variable, self.pricing.kept(path) / self.unit)
        for layer, chosen in enumerate(path):
            for expert in np.flatnonzero(self.relaxation.sets[chosen]).tolist():
                self.rows[layer * self.experts + expert].SetCoefficient(variable, 1.0)
            if self.level_rows:
                for row, value in zip(self.level_rows[layer], self.pricing.excess[layer, chosen], strict=True):
                    if value:
                        row.SetCoefficient(variable, -float(value) / self.load_unit)

    def solve(self) -> bool:
        return bool(self.solver.Solve() == self.optimal)

    @property
    def value(self) -> float:
        return float(self.objective.Value()) * self.unit - self.pricing.paid

    def duals(self) -> tuple[Floats, Floats]:
        """Prices [layers, experts] and shares [layers, levels], which are at least 0 and at most the weight in all."""
        prices = self.unit * np.array([row.dual_value() for row in self.rows]).reshape(self.layers, self.experts)
        shares = np.zeros(self.pricing.levels.shape)
        if self.level_rows:
            shares = np.maximum(-np.array([[row.dual_value() for row in rows] for rows in self.level_rows]), 0.0)
            shares *= self.unit / self.load_unit
            total = shares.sum(axis=1, keepdims=True)
            shares *= np.minimum(1.0, self.relaxation.per_load / np.maximum(total, 1e-300))
        return prices, shares

    def shares_of_paths(self) -> list[tuple[Path, float]]:
        return [(path, variable.solution_value()) for path, variable in self.columns]  # type: ignore[attr-defined]
