"""Which values to keep when every kept byte has a price: a minimum cut, exact for any prices.

Keeping value v costs ``price[v]``, running op o again costs its seconds. What the backward reads must be kept or made
again, and what is made again needs its operands kept or made again. That is a closure problem; its optimum is a minimum
cut (Picard 1976), found by push-relabel. With prices from the dual of the memory constraints the cut is a Lagrangian
lower bound on the time of every choice that keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .simulate import Simulator

#: Resolution of seconds in the solver's integers, and the capacity that stands for "never".
_RESOLUTION = 1e13
_NEVER = 1 << 58
#: Seconds that decide between keeping a value that crosses layers and one of equal size that does not.
_TIE = 1e-8


@dataclass(frozen=True)
class _Network:
    """Arcs and their seconds, infinite where a cut must not be; those of ``made`` values are at ``priced``, with what a
    price is counted on, what their copies cost, and what keeping them does."""

    start: NDArray[np.int32]
    end: NDArray[np.int32]
    seconds: NDArray[np.float64]
    priced: NDArray[np.int64]
    bytes: NDArray[np.float64]
    swap: NDArray[np.float64]
    keep: NDArray[np.float64]
    made: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """``saved`` values, and those that are ``swapped`` to the host; ``seconds`` of recomputation, of writing what is
    kept and of copies; ``weight`` of what is kept on the device."""

    saved: frozenset[int]
    swapped: frozenset[int]
    seconds: float
    weight: float

    @property
    def key(self) -> tuple[frozenset[int], frozenset[int]]:
        return self.saved, self.swapped


class PricedCuts:
    """Minimum cuts of one problem for different prices."""

    def __init__(
        self,
        simulator: Simulator,
        crossing: frozenset[int] = frozenset(),
        swap_seconds: Callable[[int], float] | None = None,
    ) -> None:
        """``swap_seconds``: what sending a value to the host and back costs; None: nothing is swapped. ``crossing``:
        values between layers, which the forward writes out anyway. Of equals they are kept first, so that no layer's
        backward reaches back through the layers before it."""
        problem = simulator.problem
        self.simulator, self.problem, self.crossing = simulator, problem, crossing
        self.swap_seconds = swap_seconds
        # Only what the backward can reach by recomputation takes part.
        reached = simulator.closure(frozenset())
        self.ops = sorted(self._reachable())
        made = {v for index in self.ops for v in problem.ops[index].writes}
        self.values = sorted(made - simulator.handed_out)
        self.always = reached[1] - set(self.values)
        self._network = self._arcs()

    def _reachable(self) -> set[int]:
        problem, made = self.problem, self.simulator.made_forward - self.simulator.handed_out
        waiting = [v for op in self.simulator.backward_ops for v in op.reads] + list(problem.backward_outputs)
        found: set[int] = set()
        while waiting:
            value = waiting.pop()
            if value not in made:
                continue
            index = problem.values[value].op
            if index not in found:
                found.add(index)
                if not self.simulator.fixed(problem.ops[index]):
                    waiting.extend(problem.ops[index].reads)
        return found

    def keep_seconds(self, value: int) -> float:
        """What keeping a value costs, whatever its bytes are worth."""
        return 0.0 if value in self.crossing else max(_TIE, self.problem.values[value].keep_seconds)

    def swap_cost(self, value: int) -> float:
        """Seconds that a value's way to the host and back costs; infinite where it stays."""
        if self.swap_seconds is None or value in self.simulator.outputs:
            return math.inf
        return self.swap_seconds(value)

    def _arcs(self) -> _Network:
        """Of a node for each op and each value, after the source and the sink; once for all prices."""
        problem, simulator = self.problem, self.simulator
        number = {v: 2 + len(self.ops) + n for n, v in enumerate(self.values)}
        direct = {v for op in simulator.backward_ops for v in op.reads} | set(problem.backward_outputs)
        arcs: list[tuple[int, int, float]] = []
        priced: list[int] = []
        made: list[int] = []
        for node, index in enumerate(self.ops, start=2):
            op = problem.ops[index]
            fixed = simulator.fixed(op)
            arcs.append((0, node, math.inf if fixed else max(op.seconds, 1e-12)))
            if not fixed:
                arcs += [(number[v], node, math.inf) for v in op.reads if v in number]
            for v in op.writes:
                if v not in number:
                    continue
                made.append(v)
                priced.append(len(arcs))
                arcs.append((node, number[v], 0.0))
                if v in direct:
                    arcs.append((number[v], 1, math.inf))
        start, end = (np.array([arc[side] for arc in arcs], np.int32) for side in (0, 1))
        return _Network(
            start,
            end,
            np.array([arc[2] for arc in arcs], np.float64),
            np.array(priced, np.int64),
            np.array([float(problem.values[v].bytes) for v in made], np.float64),
            np.array([self.swap_cost(v) for v in made], np.float64),
            np.array([self.keep_seconds(v) for v in made], np.float64),
            tuple(made),
        )

    def best(self, weights: Mapping[int, float] | None, price: float) -> Cut:
        """The cheapest choice where keeping v costs ``price · weights[v]`` (its bytes if None) and its writing."""
        from ortools.graph.python.max_flow import SimpleMaxFlow

        problem, found = self.problem, self._network
        weighed = found.bytes if weights is None else np.array([weights.get(v, 0.0) for v in found.made], np.float64)
        seconds_of = found.seconds.copy()
        seconds_of[found.priced] = np.minimum(price * weighed, found.swap) + found.keep + 1e-12
        capacity = np.minimum(np.rint(seconds_of * _RESOLUTION), float(_NEVER)).astype(np.int64)
        solver = SimpleMaxFlow()
        below: set[int] = set()
        if len(capacity):
            solver.add_arcs_with_capacity(found.start, found.end, capacity)
            if solver.solve(0, 1) == SimpleMaxFlow.OPTIMAL:
                below = set(solver.get_sink_side_min_cut())
        again = {index for node, index in enumerate(self.ops, start=2) if node in below}
        wanted = {v for node, v in enumerate(self.values, start=2 + len(self.ops)) if node in below}
        kept = frozenset(v for v in wanted if problem.values[v].op not in again)

        def weight_of(v: int) -> float:
            return float(problem.values[v].bytes) if weights is None else weights.get(v, 0.0)

        swapped = frozenset(v for v in kept if self.swap_cost(v) < price * weight_of(v))
        seconds = sum(problem.ops[index].seconds for index in again)
        seconds += sum(map(self.keep_seconds, kept)) + sum(map(self.swap_cost, swapped))
        return Cut(kept - swapped, swapped, seconds, sum(map(weight_of, kept - swapped)))

    def frontier(self, weights: Mapping[int, float] | None = None, limit: int = 48) -> list[Cut]:
        """The choices that are best for some price, from the fastest to the smallest (Eisner and Severance 1976)."""
        fast, small = self.best(weights, 0.0), self.best(weights, 1e-3)
        found = {fast.key: fast, small.key: small}
        waiting = [(fast, small)]
        while waiting and len(found) < limit:
            left, right = waiting.pop(0)
            if left.weight - right.weight <= 0 or right.seconds - left.seconds <= 0:
                continue
            price = (right.seconds - left.seconds) / (left.weight - right.weight)
            middle = self.best(weights, price)
            value = middle.seconds + price * middle.weight
            if middle.key in found or value >= (left.seconds + price * left.weight) * (1 - 1e-9):
                continue
            found[middle.key] = middle
            waiting += [(left, middle), (middle, right)]
        return pareto(list(found.values()))


def pareto(cuts: Sequence[Cut]) -> list[Cut]:
    """Those that no other beats in both seconds and weight, fastest first."""
    best: list[Cut] = []
    for cut in sorted(cuts, key=lambda c: (c.seconds, c.weight)):
        if not best or cut.weight < best[-1].weight:
            best.append(cut)
    return best
