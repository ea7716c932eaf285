"""Pipeline schedules as a CP-SAT model.

Sets: passes i with length d_i on rank r_i; precedences i -> j with lag l_ij (transfers, collectives); stages s with
activations a_s on ranks with limit A_r.

    minimise    C
    subject to  x_j >= x_i + d_i + l_ij                        for each precedence
                [x_i, x_i + d_i) of one rank do not overlap
                x of (kind, stage, k + 1) >= end of (kind, stage, k)    microbatches are alike, so their order is free
                sum of a_s over microbatches between F and backward <= A_r    at every moment
                C >= x_i + d_i + g_i    g_i: adding up over replicas what the pass has completed

With one stage on a rank the memory limit is a precedence: the forward of k + c waits for the backward of k. Time is
whole numbers of a unit so fine that rounding is far below a pass; lengths are rounded up, and what that may have added
is taken off the bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ScheduleError
from ...formatting import seconds_text
from ...logs import tell_gap
from .bounds import heads_and_tails, lower_bound
from .heuristics import Found, best_schedule, keeps_limit
from .precedence import Problem, passes_by_microbatch
from .schedule import Pass, Schedule
from .simulate import simulate

#: Largest problem that is given to CP-SAT; beyond it, patterns and list schedules.
MOST_RANKS, MOST_MICROBATCHES = 8, 16
#: Time units in the horizon.
RESOLUTION = 10**7


@dataclass(frozen=True)
class Solved:
    """``found``: the best schedule, never worse than the best heuristic. ``status``: optimal or feasible."""

    found: Found
    status: str
    seconds: float
    seed: int
    heuristic: float


def solve(
    problem: Problem, patterns: Iterable[Schedule], *, time_limit: float = 30.0, seed: int = 0, workers: int = 2
) -> Solved:
    """The best schedule that is found in ``time_limit`` seconds, with the best heuristic as a hint.

    Raises ScheduleError for interlaced vocabulary passes, and when no heuristic keeps the memory limit.
    """
    if problem.shell.vocabulary == "interlaced":
        raise ScheduleError("interlaced passes leave nothing to order", remedy="take one-barrier or two-barriers")
    begin = time.monotonic()
    first = best_schedule(problem, patterns)
    heuristic = first.run.seconds
    large = problem.shell.ranks > MOST_RANKS or problem.shell.microbatches > MOST_MICROBATCHES
    if first.gap < 1e-9 or large:
        status = "optimal" if first.gap < 1e-9 else "feasible"
        return Solved(first, status, time.monotonic() - begin, seed, heuristic)
    found, status = _improve(problem, first, time_limit, seed, workers)
    return Solved(found, status, time.monotonic() - begin, seed, heuristic)


def _improve(problem: Problem, first: Found, time_limit: float, seed: int, workers: int) -> tuple[Found, str]:
    from ortools.sat.python import cp_model

    finish = max(problem.costs.finish, default=0.0)
    unit = _unit(problem, first.run.seconds)
    model = _Model(problem, cp_model.CpModel(), unit, first.run.seconds - finish)
    model.bound(lower_bound(problem) - finish)
    model.hint(first)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit
    solver.parameters.random_seed = seed
    solver.parameters.num_workers = workers
    # Tried on ZB-V with 4 ranks and 8 microbatches: proved in 15 s with these, open after 30 s without.
    solver.parameters.use_dynamic_precedence_in_disjunctive = True
    solver.parameters.use_strong_propagation_in_disjunctive = True
    solver.parameters.use_overload_checker_in_cumulative = True
    solver.parameters.use_hard_precedences_in_cumulative = True

    def tell(value: float, bound: float) -> None:
        tell_gap("pipeline schedule", value * unit + finish, bound * unit - model.rounding + finish, seconds_text)

    class Watch(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:
            tell(self.objective_value, self.best_objective_bound)

    status = solver.solve(model.model, Watch())
    proven = max(first.bound, solver.best_objective_bound * unit - model.rounding + finish)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return replace(first, bound=min(proven, first.run.seconds)), "feasible"
    schedule = model.schedule(solver)
    run = simulate(schedule, problem.costs)
    # The model counts activations; logits between S and T may be too much all the same.
    better = run.seconds < first.run.seconds and keeps_limit(problem, run)
    best = Found(schedule, run, 0.0) if better else first
    best = replace(best, bound=min(proven, best.run.seconds))
    return best, "optimal" if best.gap < 1e-6 or (status == cp_model.OPTIMAL and best.gap < 1e-4) else "feasible"


def _unit(problem: Problem, horizon: float) -> float:
    """The unit of time: the greatest that all lengths and lags are multiples of, if there is one that is not far too
    small; else a fraction of the horizon. The coarser, the more the solver can conclude."""
    lengths = {problem.costs.seconds(each) for each in passes_by_microbatch(problem) if each.microbatch == 0}
    lengths |= {problem.costs.transfer, *problem.costs.transfers, problem.costs.collective}
    found = 0.0
    for length in lengths:
        low, high = sorted((found, length))
        while low > horizon * 1e-6:
            low, high = high % low, low
            if high - low < horizon * 1e-9:
                low = 0.0
        found = high
    exact = found > horizon * 1e-5 and all(abs(length / found - round(length / found)) < 1e-6 for length in lengths)
    return found if exact else horizon / RESOLUTION


class _Model:
    def __init__(self, problem: Problem, model: Any, unit: float, horizon: float) -> None:
        self.problem, self.model, self.unit = problem, model, unit
        shell, costs = problem.shell, problem.costs
        passes = passes_by_microbatch(problem)
        heads, tails = heads_and_tails(problem)
        self.length = {each: self._units(costs.seconds(each)) for each in passes}
        #: Most that rounding up can have added to a path: what it added to all passes of the longest rank and once a
        #: lag.
        exact = all(abs(self.length[each] - costs.seconds(each) / unit) < 1e-5 for each in passes)
        self.rounding = 0.0 if exact else unit * (2 * len(passes) // shell.ranks + 2)
        self.top = top = self._units(horizon) + 2 * len(passes)
        self.start = {
            each: model.new_int_var(
                math.floor(heads[each] / unit + 1e-6), top - math.floor(tails[each] / unit + 1e-6), f"x_{each}"
            )
            for each in passes
        }
        self.makespan = model.new_int_var(0, top, "C")
        self._precedences(passes)
        self._ranks(passes)
        self._memory()
        model.minimize(self.makespan)

    def _units(self, seconds: float) -> int:
        return math.ceil(seconds / self.unit - 1e-6)

    def _end(self, each: Pass) -> Any:
        return self.start[each] + self.length[each]

    def _precedences(self, passes: list[Pass]) -> None:
        model = self.model
        barriers: dict[tuple[str, int], Any] = {}
        for each in passes:
            waits = self.problem.waits(each)
            if len(waits) > 2:  # a barrier: one variable for all that wait at it
                key = (waits[0][0].kind, each.microbatch)
                if key not in barriers:
                    barriers[key] = model.new_int_var(0, self.top, f"barrier_{key}")
                    for need, _ in waits:
                        model.add(barriers[key] >= self._end(need))
                model.add(self.start[each] >= barriers[key] + self._units(waits[0][1]))
            else:
                for need, lag in waits:
                    model.add(self.start[each] >= self._end(need) + self._units(lag))
            if each.microbatch:
                model.add(self.start[each] >= self._end(Pass(each.kind, each.stage, each.microbatch - 1)))
            summed = self.problem.costs.sum_seconds(each, self.problem.end_kind)
            # Rounded down: what follows a pass here never makes the bound larger than it is.
            model.add(self.makespan >= self._end(each) + math.floor(summed / self.unit + 1e-6))

    def _ranks(self, passes: list[Pass]) -> None:
        shell = self.problem.shell
        intervals: list[list[Any]] = [[] for _ in range(shell.ranks)]
        for each in passes:
            interval = self.model.new_fixed_size_interval_var(self.start[each], self.length[each], f"i_{each}")
            intervals[shell.rank_of(each)].append(interval)
        for group in intervals:
            self.model.add_no_overlap(group)

    def _memory(self) -> None:
        problem, shell, model = self.problem, self.problem.shell, self.model
        if problem.limit is None or not problem.costs.activation:
            return
        for rank in range(shell.ranks):
            stages = [stage for stage, owner in enumerate(shell.placement) if owner == rank]
            most = problem.live_limit(rank)
            if most is not None:
                for microbatch in range(most, shell.microbatches):
                    released = Pass(problem.end_kind, stages[0], microbatch - most)
                    model.add(self.start[Pass("F", stages[0], microbatch)] >= self._end(released))
                continue
            lives, sizes = [], []
            for stage in stages:
                for microbatch in range(shell.microbatches):
                    begin = self.start[Pass("F", stage, microbatch)]
                    end = self._end(Pass(problem.end_kind, stage, microbatch))
                    size = model.new_int_var(0, self.top, "")
                    lives.append(model.new_interval_var(begin, size, end, ""))
                    sizes.append(problem.costs.activation[stage])
            model.add_cumulative(lives, sizes, problem.limit[rank])

    def bound(self, seconds: float) -> None:
        """What is known not to be beaten."""
        self.model.add(self.makespan >= math.floor(seconds / self.unit + 1e-6))

    def hint(self, first: Found) -> None:
        steps = first.run.steps
        begin = {
            step.name: first.run.timeline.start[index] for index, step in enumerate(steps) if step.kind == "region"
        }
        for each, variable in self.start.items():
            self.model.add_hint(variable, self._units(begin[str(each)]))

    def schedule(self, solver: Any) -> Schedule:
        """The order in which each rank begins its passes."""
        shell = self.problem.shell
        orders: list[list[tuple[int, int, Pass]]] = [[] for _ in range(shell.ranks)]
        for number, (each, variable) in enumerate(self.start.items()):
            orders[shell.rank_of(each)].append((solver.value(variable), number, each))
        found = replace(
            shell, name="cp-sat", orders=tuple(tuple(each for _, _, each in sorted(items)) for items in orders)
        )
        found.check()
        return found
