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

from .simulate import Simulator

#: Resolution of seconds in the solver's integers, and the capacity that stands for "never".
_RESOLUTION = 1e13
_NEVER = 1 << 58
#: Seconds that decide between keeping a value that crosses layers and one of equal size that does not.
_TIE = 1e-8


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

    def best(self, weights: Mapping[int, float] | None, price: float) -> Cut:
        """The cheapest choice where keeping v costs ``price · weights[v]`` (its bytes if None) and its writing."""
        from ortools.graph.python.max_flow import SimpleMaxFlow

        problem, simulator = self.problem, self.simulator
        solver = SimpleMaxFlow()
        number = {("op", index): 2 + n for n, index in enumerate(self.ops)}
        number |= {("value", v): 2 + len(self.ops) + n for n, v in enumerate(self.values)}
        direct = {v for op in simulator.backward_ops for v in op.reads} | set(problem.backward_outputs)

        def arc(start: int, end: int, seconds: float | None) -> None:
            capacity = _NEVER if seconds is None else min(_NEVER, round(seconds * _RESOLUTION))
            if capacity > 0:
                solver.add_arc_with_capacity(start, end, capacity)

        for index in self.ops:
            op = problem.ops[index]
            node = number["op", index]
            arc(0, node, None if simulator.fixed(op) else max(op.seconds, 1e-12))
            if not simulator.fixed(op):
                for v in op.reads:
                    if ("value", v) in number:
                        arc(number["value", v], node, None)
            for v in op.writes:
                if ("value", v) not in number:
                    continue
                entry = problem.values[v]
                weight = float(entry.bytes) if weights is None else weights.get(v, 0.0)
                held = min(price * weight, self.swap_cost(v))
                arc(node, number["value", v], held + self.keep_seconds(v) + 1e-12)
                if v in direct:
                    arc(number["value", v], 1, None)
        if solver.num_arcs() and solver.solve(0, 1) == SimpleMaxFlow.OPTIMAL:
            below = set(solver.get_sink_side_min_cut())
        else:
            below = set()
        again = {index for index in self.ops if number["op", index] in below}
        wanted = {v for v in self.values if number["value", v] in below}
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
