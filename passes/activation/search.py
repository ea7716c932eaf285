"""The choice for a budget: cuts, options, the master problem and the exact simulator, one after the other.

What is offered does not depend on the budget, save that the master problem is solved for budgets of a fixed grid: for
the next smaller one, and on downwards until the bound on the time proves that what needs less memory is no faster (what
the master problem takes for the fastest need not be that in the simulation). So a smaller budget never gets a larger
peak or a shorter time.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from ...formatting import bytes_text, seconds_text
from ...logs import tell_gap
from .blocks import Block, blocks_of, crossing_values
from .candidates import Candidate, Key, evaluate, order, pareto, staircase
from .cut import Cut, PricedCuts
from .floor import lower_bound, reduce_peak, wander
from .floor_program import program_bound
from .host_link import HostLink
from .master import Master, MasterSolution
from .options import Moments, Option, options_of
from .problem import JointProblem
from .simulate import Simulator
from .token_shares import splits

#: Number of budgets that the master problem is solved for, between the floor and the peak of keeping all.
GRID = 96
#: And at most so many between the least peak of all and that of the steps.
FINE = 12
#: Seconds that keeping any value costs, so that of equal choices that which keeps less is taken.
TIE = 1e-8
#: Seconds by which the bound may be too high: the cuts' arithmetic.
ROUNDING = 1e-9
#: Prices of the copy engine that cuts are made for.
SHARES = (0.0, 0.25, 0.5, 1.0)
#: Number of budgets that choices are made for in any case where copies run beside the ops.
ANCHORS = 8
#: How often the master problem is solved where the simulator finds more memory in use than it knows.
REPAIRS = 2
#: Number of cuts, from the fastest to the smallest, of which token-wise splits are offered.
MOST_SPLIT = 12
#: A floor within this share of its bound is not proven any further.
CLOSE = 0.01


class ActivationSearch:
    """Choices for one joint graph. ``plain``: the values that are kept without a budget (torch's minimum cut).
    ``link``: the way to the host; None: nothing is swapped."""

    def __init__(
        self,
        problem: JointProblem,
        plain: frozenset[int] | None = None,
        link: HostLink | None = None,
    ) -> None:
        self.link = link
        self.blocks: tuple[Block, ...] = blocks_of(problem)
        self.crossing = crossing_values(problem, self.blocks)
        self.problem = problem = _priced(problem, self.crossing)
        self.simulator = Simulator(problem, link)
        #: What was proven in so many seconds.
        self._proven: dict[float, int] = {}
        #: What the master problem chose within so many bytes.
        self._solved: dict[int, list[Candidate]] = {}
        self.plain = evaluate(self.simulator, plain) if plain is not None else self.cuts_evaluated[0]

    @functools.cached_property
    def hulls(self) -> dict[float, list[Cut]]:
        """For each share of its copies' time that a swapped value is charged with, the best cuts. Where copies run
        beside the ops they cost nothing until the engine is busy all the time; the share is the engine's price."""
        if self.link is None or not self.link.overlapped:
            return {1.0: self._frontier(1.0)}
        return {share: self._frontier(share) for share in SHARES}

    def _frontier(self, share: float) -> list[Cut]:
        link, values = self.link, self.problem.values

        def swap_seconds(value: int) -> float:
            assert link is not None
            return share * link.both_seconds(values[value].bytes)

        return PricedCuts(self.simulator, self.crossing, swap_seconds if link is not None else None).frontier()

    @functools.cached_property
    def families(self) -> list[list[Cut]]:
        """The best cuts for each share, and those without copies where the host has no room for all of the others'."""
        found = [*self.hulls.values()]
        values = self.problem.values
        if any(sum(values[v].bytes for v in cut.swapped) > self._host for cuts in found for cut in cuts):
            found.append(PricedCuts(self.simulator, self.crossing).frontier())
        return found

    @functools.cached_property
    def cuts_evaluated(self) -> list[Candidate]:
        found = {cut.key: cut for cuts in self.families for cut in cuts}
        return [evaluate(self.simulator, *key) for key in found]

    @functools.cached_property
    def steps(self) -> list[Candidate]:
        """Cuts and their mixtures by layer, and what is kept without a budget; none beats another."""
        mixed = [c for cuts in self.families for c in staircase(self.simulator, cuts, self.blocks)]
        return pareto([c for c in (self.plain, *mixed) if self._on_host(c) <= self._host])

    @property
    def _host(self) -> float:
        """Bytes that the host offers."""
        return self.link.capacity if self.link is not None else math.inf

    def _on_host(self, candidate: Candidate) -> int:
        return candidate.bytes_away(self.problem.values)

    @functools.cached_property
    def offers(self) -> list[tuple[list[list[Option]], Moments]]:
        """What layers may do, with the moments that it is counted in; also with shares of tokens, where values can be
        split."""
        wholes = self.cuts_evaluated
        kinds = [wholes, [*wholes, *self.token_splits]] if self.token_splits else [wholes]
        return [options_of(self.problem, self.blocks, uniform, self.crossing, self.link) for uniform in kinds]

    @functools.cached_property
    def masters(self) -> list[Master]:
        """The master problem of each offer."""
        return [Master(self.blocks, options, moments, self.link) for options, moments in self.offers]

    @functools.cached_property
    def token_splits(self) -> list[Candidate]:
        """Cuts that swap, with each share of the tokens of what they swap: in the master problem each layer may take
        another one."""
        if self.link is None or not self.problem.divisible:
            return []
        cuts = {cut.key: cut for cut in self.cuts_evaluated if cut.swapped & self.problem.divisible}
        spread = [*cuts.values()]
        chosen = spread[:: max(1, -(-len(spread) // MOST_SPLIT))]
        return [
            evaluate(self.simulator, cut.saved, cut.swapped, shares)
            for cut in chosen
            for shares in splits(cut.swapped, self.problem.divisible)
        ]

    def master(self, limit: int | None, unknown: int = 0, beyond: int = 0) -> list[Candidate]:
        """The master problem's choices within ``limit`` bytes (None: the least), with what the simulator says of them.
        ``unknown`` bytes are left to what the problem does not know of. Where the peak is more than ``limit`` and
        ``beyond``, it is solved again with as much less."""
        found: list[Candidate] = []
        for (options, _), problem in zip(self.offers, self.masters, strict=True):
            aim = limit if limit is None else limit - unknown
            for _ in range(REPAIRS):
                solution = problem.solve(aim)
                if solution is None and aim != limit:
                    aim = limit
                    solution = problem.solve(aim)
                if solution is None:
                    break
                found.append(self._chosen(options, solution, aim))
                if limit is None or aim is None or found[-1].peak <= limit + beyond:
                    break
                aim -= found[-1].peak - limit
        return found

    @functools.cached_property
    def unknown(self) -> int:
        """By how many bytes the peak of a cut is more than the master problem knows of, for most cuts."""
        options, moments = self.offers[0]
        found = []
        for cut in self.cuts_evaluated:
            saved = [cut.saved & frozenset(block.values) for block in self.blocks]
            own = [
                next((o for o in offered if o.saved == kept), None)
                for offered, kept in zip(options, saved, strict=True)
            ]
            chosen = [option for option in own if option is not None]
            if len(chosen) == len(own):
                held = [0, *itertools.accumulate(option.saved_bytes for option in chosen)]
                known = max(o.transient + before for o, before in zip(chosen, held, strict=False))
                found.append(cut.peak - max(known, moments.start + held[-1]))
        return max(0, sorted(found)[len(found) // 2]) if found else 0

    def _chosen(self, options: list[list[Option]], found: MasterSolution, limit: int | None) -> Candidate:
        if limit is None:
            tell_gap("least memory for activations", found.value, found.bound, lambda size: bytes_text(int(size)))
        else:
            tell_gap(f"recomputation within {bytes_text(limit)}", found.value, found.bound, seconds_text)
        saved = frozenset(v for i, o in enumerate(found.chosen) for v in options[i][o].saved)
        swapped = frozenset(v for i, o in enumerate(found.chosen) for v in options[i][o].swapped)
        shares = frozenset(s for i, o in enumerate(found.chosen) for s in options[i][o].shares)
        return evaluate(self.simulator, saved, swapped, shares)

    @functools.cached_property
    def least(self) -> Candidate:
        """The candidate with the least peak."""
        candidates = [min(self.steps, key=lambda c: c.peak), *self.master(None)]
        start = min(candidates, key=lambda c: (c.peak, c.seconds))
        return reduce_peak(self.simulator, self.blocks, start)

    @functools.cached_property
    def smallest(self) -> Candidate:
        """``least``, or what seconds of work find below it: for budgets that are smaller."""
        return reduce_peak(self.simulator, self.blocks, wander(self.simulator, self.least))

    @functools.cached_property
    def anchored(self) -> list[Candidate]:
        """Where copies run beside the ops, what the master problem knows of their time is an estimate: its choices for
        some budgets are offered for all, so that more memory is not slower."""
        if self.link is None or not self.link.overlapped:
            return []
        low, high = self.steps[-1].peak, max(self.plain.peak, self.steps[0].peak)
        return [c for n in range(ANCHORS) for c in self.master(low + (high - low) * (n + 1) // (ANCHORS + 1))]

    @functools.cached_property
    def floor_bound(self) -> int:
        """No choice has a peak below this, for this order of ops."""
        return lower_bound(self.simulator, self.steps[-1])

    @functools.cached_property
    def quick_floor_bound(self) -> int:
        """``floor_bound`` by the best cuts without their mixtures: for where all is kept, and nothing is looked for."""
        return lower_bound(self.simulator, min(self.cuts_evaluated, key=lambda c: c.peak))

    def prove_floor(self, seconds: float = 0.0) -> int:
        """``floor_bound``, or what a program proves if it is more: for refusals. It takes seconds, and these more."""
        bound = max(self.floor_bound, lower_bound(self.simulator, self.least))
        if self.link is not None or self.smallest.peak <= bound * (1 + CLOSE):
            return bound
        if seconds not in self._proven:
            self._proven[seconds] = program_bound(self.simulator, self.blocks, self.smallest, seconds)
        return max(bound, self._proven[seconds])

    def within(self, limit: int, refused: Collection[Key] = ()) -> Candidate | None:
        """The fastest candidate with a peak of at most ``limit`` bytes that is not among ``refused``."""

        def fastest(candidates: Collection[Candidate], most: int) -> Candidate | None:
            fitting = [c for c in candidates if c.peak <= most and self._on_host(c) <= self._host]
            return min((c for c in fitting if c.key not in refused), key=order, default=None)

        highest, low = self._range
        best = fastest([*self.steps, *(self.anchored if limit >= low else ())], limit)
        if limit >= highest:
            return best
        for number, (most, offered) in enumerate(self._rungs(limit)):
            if best is not None:
                # Where copies run beside the ops the bound is too loose to look further.
                overlapped = self.link is not None and self.link.overlapped
                if (number and overlapped) or best.seconds <= self.bound(most) + ROUNDING:
                    break
            found = fastest(offered(), min(most, limit))
            best = min((c for c in (best, found) if c is not None), key=order, default=None)
        return best

    @property
    def _range(self) -> tuple[int, int]:
        """Peaks of keeping all, and of the smallest of the steps."""
        return max(self.plain.peak, self.steps[0].peak), self.steps[-1].peak

    def _rungs(self, limit: int) -> Iterator[tuple[int, Callable[[], list[Candidate]]]]:
        """Peaks of at most ``limit`` downwards, each with what is looked for there; where they are does not depend on
        ``limit``. What is less than all steps takes seconds to find."""
        highest, low = self._range
        step = max(1, (highest - low) // GRID)
        if limit >= low:
            for aim in (*range(highest - step * -(-(highest - limit) // step), low, -step), low):
                yield aim + step // 2, functools.partial(self._on_rung, aim, step // 2)
        yield low, lambda: [self.least]
        least = self.least.peak
        step = max(step, (low - least) // FINE)
        for aim in (*range(low - step, least, -step), least):
            if aim <= limit:
                yield aim + step // 2, functools.partial(self._on_rung, aim, step // 2)
        yield least, lambda: [self.smallest]

    def _on_rung(self, limit: int, beyond: int) -> list[Candidate]:
        if limit not in self._solved:
            self._solved[limit] = self.master(limit, self.unknown, beyond)
        return self._solved[limit]

    def bound(self, limit: int) -> float:
        """No choice within ``limit`` bytes costs less than these seconds: the Lagrangian dual of the memory constraint
        at the moment when all that is saved lives, which the cuts' lower hull is the graph of.

        Where copies run beside the ops, a step that takes E seconds more has E >= what is computed again, and, because
        the engine has no more time than the backward with E, E >= copies - backward. So for each share f of the copies'
        time that is charged, E >= (again + f (copies - backward)) / (1 + f); and E >= again + f (copies - most), with
        the time of copying all that the host has room for."""
        room = limit - self._base
        if self.link is None or not self.link.overlapped:
            return self._on_hull(self.hulls[1.0], room)
        backward = sum(op.seconds for op in self.problem.ops if not op.forward)
        most = self.link.capacity / self.link.back + len(self.problem.values) * self.link.latency
        least = {share: self._on_hull(hull, room) for share, hull in self.hulls.items()}
        return max(
            max((seconds - share * backward) / (1 + share), seconds - share * most) for share, seconds in least.items()
        )

    @staticmethod
    def _on_hull(hull: list[Cut], room: int) -> float:
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
        first = min(self.cuts_evaluated, key=lambda c: c.seconds).simulation
        moment = first.entries[first.peak_entry]
        found = []
        for candidate in [*self.steps, *self.cuts_evaluated]:
            run = candidate.simulation
            saved = sum(self.problem.values[v].bytes for v in candidate.saved - self.simulator.handed_out)
            found += [
                size - saved
                for entry, size in zip(run.entries, run.memory, strict=True)
                if entry.op == moment.op and entry.backward == moment.backward
            ]
        return max(0, min(found))


def _priced(problem: JointProblem, crossing: frozenset[int]) -> JointProblem:
    """Keeping costs what the cuts take it for: nothing where the forward writes the value out in any case, for later
    layers or for the caller."""
    free = crossing | set(problem.forward_outputs)
    values = [replace(v, keep_seconds=0.0 if v.id in free else max(TIE, v.keep_seconds)) for v in problem.values]
    return replace(problem, values=tuple(values))
