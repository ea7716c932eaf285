"""A bound on the least peak from what must be in memory together, as a linear program (a mixed-integer one of small
graphs: k is 0 or 1).

``floor.lower_bound`` looks at one op of the backward at a time. But what is not kept for one moment is in memory at
another: a layer whose input was not kept is computed from an earlier one's, whose values then wait for their own
backward. The program has both.

Sets
    v in values of the forward that the backward may compute again;  p in moments: ops of the backward, some a layer
Variables, all in [0, 1]
    k[v]     v is kept, and read in the backward
    n[v,p]   v was at hand in the backward at p or before      (1 where an op reads it by then)
    r[v,p]   it was not, and is computed again after p
    a[v,p]   it must be at hand at p: it was, and will be read by an op of the backward, or by one that runs again
    y[v,p]   it is in memory at p;  t[v,p]: it is not, but kernels compute it from its operands, which are
Constraints
    n[u,p] >= n[v,p] - k[v]                   u an operand of the op that makes v
    r[v,p] >= 1 - n[v,p] - k[v]               the backward reads v after p, and not before
    r[u,p] >= r[v,p] - n[u,p] - k[u]          u an operand of v
    a[v,p] >= n[v,p]                          the backward reads v after p
    a[u,p] >= t[v,p], n[u,p] + r[v,p] - 1     u an operand of v
    y[v,p] + t[v,p] >= a[v,p]                 t = 0 where v must be stored
    y[v,p] >= k[v]                            the backward reads v after p, or nothing can have read it before
    y[u,p] >= k[u] + r[v,p] - 1               u an operand of v
    others at p + sum_v bytes[v] y[v,p] <= peak
Objective
    least peak

Not all moments are looked at: at first those that are crowded in a choice that is known, then those where the optimum's
own choice turns out to hold more than the optimum says.

A choice of what is kept is a solution, so no peak is below the optimum. Nothing is computed a third time, and nothing
is swapped. Of the chain of layers behind a moment only the nearest are looked at.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import Block
from .candidates import Candidate
from .cut import PricedCuts
from .options import block_of_entries
from .problem import JointProblem, Op
from .simulate import Simulator

#: At most about so many moments, and at least these most crowded ones.
MOMENTS, CROWDED = 16, 4
#: Layers behind a moment of which what they need is followed.
REACH = 3
#: Most values of a mixed-integer program, and the share of the peak from which on a value is among them.
WHOLE, COUNTS = 400, 1e-3
#: Share by which bounds on the peak that such a program is given are wider, for the solver's tolerance.
SLACK = 1e-6
#: Where the linear bound is within this share of the peak, no integers are searched; where any is within that one,
#: nothing more is.
FAR, NEAR = 0.03, 0.005
#: Share of the time that the linear program may take.
LINEAR = 0.3
#: Moments that are added at once, the share by which a bound must grow to count as larger, and how often it need not.
MISSED, LARGER, IDLE = 3, 1e-4, 2
#: What the candidate's peak is for the solver, whose tolerances are absolute.
SCALE = 1000.0


def program_bound(simulator: Simulator, blocks: Sequence[Block], candidate: Candidate, seconds: float = 0.0) -> int:
    """Bytes below which no choice of kept values has its peak. ``candidate`` is a choice, the smaller the better; none
    swaps. ``seconds``: for moments that were missed, and the mixed-integer program; without them one linear program is
    the bound."""
    begin, peak = time.monotonic(), candidate.peak
    program = _Program(simulator, blocks, candidate)
    bound = program.least(program.moments(), 0.0)
    if seconds > 0 and bound * (1 + FAR) < peak:
        # One moment at first: few are fast, and which ones matter shows.
        program = _Program(simulator, blocks, candidate)
        bound = max(bound, program.least(program.moments(1), begin + seconds * LINEAR - time.monotonic()))
    left = begin + seconds - time.monotonic()
    if left > 0 and bound * (1 + FAR) < peak:
        whole = _Program(simulator, blocks, candidate, between=(bound, peak))
        if whole.integers <= WHOLE:
            bound = max(bound, whole.least(sorted(program.binding), left))
    # One in ten million for the solvers' tolerance.
    return int(bound * (1 - 1e-7))


class _Program:
    def __init__(
        self,
        simulator: Simulator,
        blocks: Sequence[Block],
        candidate: Candidate,
        between: tuple[float, float] | None = None,
    ) -> None:
        """``between``: bytes that the least peak is known to lie between; the program is then mixed-integer."""
        from ortools.math_opt.python import mathopt

        self.simulator, self.problem, self.blocks = simulator, simulator.problem, blocks
        self.run = candidate.simulation
        self.model: Any = mathopt.Model(name="floor")
        self.unit = max(1, self.run.peak) / SCALE
        low, high = between or (0.0, math.inf)
        self.peak = self.model.add_variable(lb=low / self.unit * (1 - SLACK), ub=high / self.unit * (1 + SLACK))
        self.model.minimize(self.peak)
        values = self.problem.values
        made = [v for v in PricedCuts(simulator).values if v not in simulator.outputs]
        #: Consumers before producers.
        self.order = sorted(made, key=lambda v: -values[v].op)
        self.fixed = {v for v in made if simulator.fixed(self._maker(v))}
        self.kept = {v: self._fraction() for v in self.order if v not in self.fixed}
        self.again = {v: self._again(v) for v in made}
        self.first, self.last = _uses(simulator, candidate, frozenset(made))
        self.earliest = self._earliest()
        self.owner = block_of_entries(self.problem, blocks)
        #: Values that a library's op of the backward reads: computed again, they are stored.
        self.stored = {v for op in simulator.backward_ops if not op.fused for v in op.reads}
        counting = [k for v, k in self.kept.items() if values[v].bytes >= COUNTS * self.run.peak]
        self.integers = len(counting) if between else 0
        for kept in counting if between else ():
            kept.integer = True
        #: Moment -> the constraint of its memory; and the moments that have held an optimum.
        self.held: dict[int, Any] = {}
        self.binding: set[int] = set()

    def _maker(self, value: int) -> Op:
        return self.problem.ops[self.problem.values[value].op]

    def _fraction(self) -> Any:
        return self.model.add_variable(lb=0.0, ub=1.0)

    def _above(self, lower: Sequence[Any]) -> Any:
        """A variable that is no less than any of these."""
        found = self._fraction()
        for each in lower:
            self.model.add_linear_constraint(found >= each)
        return found

    def _again(self, value: int) -> list[int]:
        """Results of the ops that read ``value`` and may run again."""
        ops, fixed = self.problem.ops, self.simulator.fixed
        users = [ops[u] for u in self.problem.users.get(value, ())]
        return [w for op in users if op.forward and not fixed(op) for w in op.writes if w in self.kept]

    def _earliest(self) -> dict[int, float]:
        """The first op of the backward at which a value can be read, by it or by what is computed again for it."""
        found: dict[int, float] = {}
        for v in self.order:
            found[v] = min([self.first.get(v, math.inf), *(found[w] for w in self.again[v])])
        return found

    def least(self, moments: Sequence[int], seconds: float) -> float:
        """Bytes that are held at one of ``moments`` at least, or at one of those where the optimum's choice turns out
        to hold more: these are added, and the program is solved again, until it gets no larger or the time is up."""
        end, best, idle = time.monotonic() + seconds, 0.0, 0
        while True:
            for p in moments:
                self.held[p] = self._moment(p)
            bound, kept = self._solved(max(0.0, end - time.monotonic()))
            idle = 0 if bound > best * (1 + LARGER) else idle + 1
            best = max(best, bound)
            if kept is None or idle > IDLE or time.monotonic() >= end or self.run.peak <= best * (1 + NEAR):
                return best
            moments = self._missed(kept, best)
            if not moments:
                return best

    def _solved(self, seconds: float) -> tuple[float, frozenset[int] | None]:
        """A bound on the optimum, and what an optimum keeps (of fractions the larger), None if none is known."""
        from ortools.math_opt.python import mathopt

        if self.integers:
            limits = mathopt.SolveParameters(
                time_limit=datetime.timedelta(seconds=seconds), threads=1, random_seed=0, cuts=mathopt.Emphasis.OFF
            )
            result = mathopt.solve(self.model, mathopt.SolverType.GSCIP, params=limits)
            if result.termination.reason not in (
                mathopt.TerminationReason.OPTIMAL,
                mathopt.TerminationReason.FEASIBLE,
                mathopt.TerminationReason.NO_SOLUTION_FOUND,
            ):
                return 0.0, None
        else:
            result = mathopt.solve(self.model, mathopt.SolverType.GLOP)
            if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
                return 0.0, None
            prices = result.dual_values()
            self.binding.update(p for p, constraint in self.held.items() if abs(prices[constraint]) > 1e-9)
        bound = result.termination.objective_bounds.dual_bound * self.unit
        if not result.has_primal_feasible_solution():
            return bound, None
        found = result.variable_values()
        return bound, frozenset(v for v, kept in self.kept.items() if found[kept] > 0.5)

    def _missed(self, kept: frozenset[int], bound: float) -> list[int]:
        """Where a choice holds more than ``bound`` at moments that the program does not have: the most crowded ones, of
        each layer one."""
        run = self.simulator.run(kept)
        place = {entry.op: p for p, entry in enumerate(self.run.entries) if entry.backward and not entry.again}
        found: dict[int, int] = {}
        for position in sorted(range(len(run.entries)), key=lambda each: -run.memory[each]):
            entry = run.entries[position]
            if run.memory[position] <= bound or len(found) == MISSED:
                break
            p = place.get(entry.op) if entry.backward and not entry.again else None
            if p is not None and p not in self.held:
                found.setdefault(self.owner[entry.op], p)
        return sorted(found.values())

    def moments(self, most: int | None = None) -> list[int]:
        """Ops of the backward: the ``most`` most crowded of all, else some of these, and of some layers, evenly
        spread."""
        entries, memory = self.run.entries, self.run.memory
        crowded = sorted(
            (p for p, entry in enumerate(entries) if entry.backward and not entry.again), key=lambda p: -memory[p]
        )
        if most is not None:
            return crowded[:most]
        layers: dict[int, list[int]] = {}
        for position in crowded:
            layers.setdefault(self.owner[entries[position].op], []).append(position)
        chosen = set(crowded[:CROWDED])
        step, each = max(1, len(layers) // MOMENTS), max(1, MOMENTS // max(1, len(layers)))
        for layer in sorted(layers)[::step]:
            chosen.update(layers[layer][:each])
        return sorted(chosen)

    def _moment(self, p: int) -> Any:
        """Constraints for the memory at entry ``p``; the one that sums it up."""
        op, values = self.problem.ops[self.run.entries[p].op], self.problem.values
        total: float = self._others(p, op)
        layer = self.owner[op.index]
        written = {values[w].bytes for w in op.writes} if op.fused else set()
        cone = self._cone(op) if written else set()
        was: dict[int, Any] = {}
        later: dict[int, Any] = {}
        through: dict[int, Any] = {}
        terms: list[Any] = []
        for v in self.order:
            first, last = self.first.get(v, math.inf), self.last.get(v, -1)
            near = self.owner[values[v].op] > layer - REACH
            again = self.again[v]
            if first <= p:
                was[v] = 1.0
            elif near and (lower := [was[w] - self.kept[w] for w in again if w in was]):
                was[v] = self._above(lower)
            # What the op writes over, if it is the last to read it, takes no memory besides the result.
            size = 0 if v in cone and last <= p and values[v].bytes in written else values[v].bytes
            if v in self.fixed:
                total += size if last >= p else 0
                continue
            rest = [later[w] for w in again if w in later]
            if near and first > p and (ahead := [*rest, *([1.0] if v in self.first else [])]):
                later[v] = self._above([each - was.get(v, 0.0) - self.kept[v] for each in ahead])
            asked = [through[w] for w in again if w in through]
            if v in was:
                asked += [was[v]] if last >= p else [was[v] + each - 1.0 for each in rest]
            held = last >= p or (v not in self.last and p < self.earliest[v])
            kept = [self.kept[v]] if held else [self.kept[v] + each - 1.0 for each in rest]
            sure = last >= p and first <= p
            if v in self.stored or not self._maker(v).inlined:
                if sure:
                    total += size
                elif asked or kept:
                    terms.append(size / self.unit * self._above([*asked, *kept]))
            elif asked or kept:
                inside = self._above(kept)
                if asked:
                    through[v] = self._fraction()
                for each in asked:
                    self.model.add_linear_constraint(inside + through[v] >= each)
                terms.append(size / self.unit * inside)
        return self.model.add_linear_constraint(self.peak >= total / self.unit + sum(terms))

    def _others(self, p: int, op: Op) -> int:
        """Bytes in memory at ``p`` besides what is kept or computed again."""
        values, simulator = self.problem.values, self.simulator
        ends = {v: end for v, begin, end in self.run.lives if begin <= p <= end}
        held = [v for v in ends if v not in self.again or v in op.writes]
        total = self.problem.constant + sum(values[v].bytes for v in held)
        if op.fused:
            lasting = simulator.given | simulator.outputs
            rooms = [values[v].bytes for v in held if ends[v] == p and v not in lasting]
            for w in op.writes:
                if values[w].bytes in rooms:
                    rooms.remove(values[w].bytes)
                    total -= values[w].bytes
        return total

    def _cone(self, op: Op) -> set[int]:
        """What the kernel of ``op`` may read: its operands, and those of operands that need not be stored."""
        waiting, found = list(op.reads), set()
        while waiting:
            v = waiting.pop()
            if v not in found:
                found.add(v)
                maker = self.problem.values[v].op
                if maker >= 0 and self.problem.ops[maker].inlined:
                    waiting.extend(self.problem.ops[maker].reads)
        return found


def _uses(
    simulator: Simulator, candidate: Candidate, values: frozenset[int]
) -> tuple[Mapping[int, int], Mapping[int, int]]:
    """Value -> the first and the last entry at which an op of the backward reads it. One that is inlined runs with the
    first kernel that reads its result."""
    problem: JointProblem = simulator.problem
    entries = candidate.simulation.entries
    runs = {entry.op: position for position, entry in enumerate(entries) if entry.backward and not entry.again}
    for op in reversed(simulator.backward_ops):
        if op.index not in runs:
            readers = [runs[u] for v in op.writes for u in problem.users.get(v, ()) if u in runs]
            if readers:
                runs[op.index] = min(readers)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for op in simulator.backward_ops:
        if op.index in runs:
            for v in values.intersection(op.reads):
                first[v] = min(first.get(v, runs[op.index]), runs[op.index])
                last[v] = max(last.get(v, -1), runs[op.index])
    return first, last
