"""The choice for a budget: cuts, options, the master problem and the exact simulator, one after the other.

What is offered does not depend on the budget, save that the master problem is solved for the next smaller budget of a
fixed grid, to optimality: so a smaller budget never gets a larger peak or a shorter time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection

from ...formatting import bytes_text, seconds_text
from ...logs import tell_gap
from .blocks import Block, blocks_of, crossing_values
from .candidates import Candidate, evaluate, pareto, staircase
from .cut import Cut, PricedCuts
from .floor import lower_bound, reduce_peak
from .master import MasterSolution, solve_master
from .options import Moments, Option, options_of
from .problem import JointProblem
from .simulate import Simulator

#: What is saved, and what is swapped.
Key = tuple[frozenset[int], frozenset[int]]
#: Number of budgets that the master problem is solved for, between the floor and the peak of keeping all.
GRID = 96


class ActivationSearch:
    """Choices for one joint graph. ``plain``: the values that are kept without a budget (torch's minimum cut).
    ``swap_seconds``: what it costs that a value goes to the host and comes back; None: nothing is swapped."""

    def __init__(
        self,
        problem: JointProblem,
        plain: frozenset[int] | None = None,
        swap_seconds: Callable[[int], float] | None = None,
    ) -> None:
        self.problem = problem
        self.swap_seconds = swap_seconds
        self.copy_seconds = swap_seconds or (lambda value: 0.0)
        self.simulator = Simulator(problem)
        self.blocks: tuple[Block, ...] = blocks_of(problem)
        self.crossing = crossing_values(problem, self.blocks)
        self.plain = evaluate(self.simulator, plain) if plain is not None else self.cuts_evaluated[0]

    @functools.cached_property
    def cuts(self) -> list[Cut]:
        return PricedCuts(self.simulator, self.crossing, self.swap_seconds).frontier()

    @functools.cached_property
    def cuts_evaluated(self) -> list[Candidate]:
        return [evaluate(self.simulator, *cut.key, self.copy_seconds) for cut in self.cuts]

    @functools.cached_property
    def steps(self) -> list[Candidate]:
        """Cuts and their mixtures by layer, and what is kept without a budget; none beats another."""
        return pareto([self.plain, *staircase(self.simulator, self.cuts, self.blocks, self.copy_seconds)])

    @functools.cached_property
    def offers(self) -> tuple[list[list[Option]], Moments]:
        return options_of(self.problem, self.blocks, self.cuts_evaluated, self.crossing, self.copy_seconds)

    def master(self, limit: int | None) -> tuple[Candidate, MasterSolution] | None:
        """The master problem's choice within ``limit`` bytes (None: the least), with what the simulator says of it."""
        options, moments = self.offers
        found = solve_master(self.blocks, options, moments, limit)
        if found is None:
            return None
        if limit is None:
            tell_gap("least memory for activations", found.value, found.bound, lambda size: bytes_text(int(size)))
        else:
            tell_gap(f"recomputation within {bytes_text(limit)}", found.value, found.bound, seconds_text)
        saved = frozenset(v for i, o in enumerate(found.chosen) for v in options[i][o].saved)
        swapped = frozenset(v for i, o in enumerate(found.chosen) for v in options[i][o].swapped)
        return evaluate(self.simulator, saved, swapped, self.copy_seconds), found

    @functools.cached_property
    def least(self) -> Candidate:
        """The candidate with the least peak."""
        candidates = [min(self.steps, key=lambda c: c.peak)]
        found = self.master(None)
        if found is not None:
            candidates.append(found[0])
        start = min(candidates, key=lambda c: (c.peak, c.seconds))
        return reduce_peak(self.simulator, self.blocks, start, self.copy_seconds)

    @functools.cached_property
    def floor_bound(self) -> int:
        """No choice has a peak below this, for this order of ops."""
        return lower_bound(self.simulator, self.least)

    def within(self, limit: int, refused: Collection[Key] = ()) -> Candidate | None:
        """The fastest candidate with a peak of at most ``limit`` bytes that is not among ``refused``."""
        candidates = list(self.steps)
        highest = max(self.plain.peak, self.steps[0].peak)
        step = max(1, (highest - self.least.peak) // GRID)
        if self.least.peak <= limit < highest:
            snapped = highest - step * -(-(highest - limit) // step)
            found = self.master(max(snapped, self.least.peak))
            candidates += [found[0]] if found is not None else []
        candidates.append(self.least)
        fitting = [c for c in candidates if c.peak <= limit and c.key not in refused]
        return min(fitting, key=lambda c: (c.seconds, c.peak, sorted(c.saved), sorted(c.swapped)), default=None)

    def bound(self, limit: int) -> float:
        """No choice within ``limit`` bytes costs less than these seconds: the Lagrangian dual of the memory constraint
        at the moment when all that is saved lives, which the cuts' lower hull is the graph of."""
        room = limit - self._base
        hull = self.cuts
        if room >= hull[0].weight:
            return hull[0].seconds
        for left, right in itertools.pairwise(hull):
            if right.weight <= room:
                share = (left.weight - room) / (left.weight - right.weight)
                return left.seconds + share * (right.seconds - left.seconds)
        return hull[-1].seconds

    @functools.cached_property
    def _base(self) -> int:
        """Bytes besides what is saved when the fastest choice is at its peak; of all choices the least."""
        first = self.cuts_evaluated[0].simulation
        moment = first.entries[first.peak_entry]
        found = []
        for candidate in [*self.steps, *self.cuts_evaluated]:
            run = candidate.simulation
            saved = sum(self.problem.values[v].bytes for v in candidate.saved)
            found += [
                size - saved
                for entry, size in zip(run.entries, run.memory, strict=True)
                if entry.op == moment.op and entry.backward == moment.backward
            ]
        return max(0, min(found))
