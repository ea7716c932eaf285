"""Which values to keep when every kept byte has a price: a minimum cut, exact for any prices.

Keeping value v costs ``price[v]``, running op o again costs its seconds. What the backward reads must be kept or made
again, and what is made again needs its operands kept or made again. That is a closure problem; its optimum is a minimum
cut (Picard 1976), found by push-relabel. With prices from the dual of the memory constraints the cut is a Lagrangian
lower bound on the time of every choice that keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .simulate import Simulator

#: Resolution of seconds in the solver's integers, and the capacity that stands for "never".
_RESOLUTION = 1e13
_NEVER = 1 << 58
#: Seconds that decide between keeping a value that crosses layers and one of equal size that does not.
_TIE = 1e-8


@dataclass(frozen=True)
class Cut:
    """``saved`` values; ``seconds`` of recomputation and of writing what is kept; ``weight`` of what is kept."""

    saved: frozenset[int]
    seconds: float
    weight: float


class PricedCuts:
    """Minimum cuts of one problem for different prices."""

    def __init__(self, simulator: Simulator, crossing: frozenset[int] = frozenset()) -> None:
        """``crossing``: values between layers, which the forward writes out anyway. Of equals they are kept first, so
        that no layer's backward reaches back through the layers before it."""
        problem = simulator.problem
        self.simulator, self.problem, self.crossing = simulator, problem, crossing
        # Only what the backward can reach by recomputation takes part.
        reached = simulator.closure(frozenset())
        self.ops = sorted(self._reachable())
        self.values = sorted({v for index in self.ops for v in problem.ops[index].writes})
        self.always = reached[1] - set(self.values)

    def _reachable(self) -> set[int]:
        problem, made = self.problem, self.simulator.made_forward
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

    def best(self, weights: Mapping[int, float] | None, price: float) -> Cut:
        """The cheapest choice where keeping v costs ``price · weights[v]`` (its bytes if None) and its writing."""
        from ortools.graph.python.max_flow import SimpleMaxFlow

        problem, simulator = self.problem, self.simulator
        solver = SimpleMaxFlow()
        number = {("op", index): 2 + n for n, index in enumerate(self.ops)}
        number |= {("value", v): 2 + len(self.ops) + n for n, v in enumerate(self.values)}
        members = set(self.ops)
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
                    if v in simulator.made_forward and problem.values[v].op in members:
                        arc(number["value", v], node, None)
            for v in op.writes:
                entry = problem.values[v]
                weight = float(entry.bytes) if weights is None else weights.get(v, 0.0)
                arc(node, number["value", v], price * weight + self.keep_seconds(v) + 1e-12)
                if v in direct:
                    arc(number["value", v], 1, None)
        if solver.num_arcs() and solver.solve(0, 1) == SimpleMaxFlow.OPTIMAL:
            below = set(solver.get_sink_side_min_cut())
        else:
            below = set()
        again = {index for index in self.ops if number["op", index] in below}
        wanted = {v for v in self.values if number["value", v] in below}
        saved = frozenset(v for v in wanted if problem.values[v].op not in again)
        seconds = sum(problem.ops[index].seconds for index in again)
        seconds += sum(map(self.keep_seconds, saved))
        weight = sum(problem.values[v].bytes if weights is None else weights.get(v, 0.0) for v in saved)
        return Cut(saved, seconds, float(weight))

    def frontier(self, weights: Mapping[int, float] | None = None, limit: int = 48) -> list[Cut]:
        """The choices that are best for some price, from the fastest to the smallest (Eisner and Severance 1976)."""
        fast, small = self.best(weights, 0.0), self.best(weights, 1e-3)
        found = {fast.saved: fast, small.saved: small}
        waiting = [(fast, small)]
        while waiting and len(found) < limit:
            left, right = waiting.pop(0)
            if left.weight - right.weight <= 0 or right.seconds - left.seconds <= 0:
                continue
            price = (right.seconds - left.seconds) / (left.weight - right.weight)
            middle = self.best(weights, price)
            value = middle.seconds + price * middle.weight
            if middle.saved in found or value >= (left.seconds + price * left.weight) * (1 - 1e-9):
                continue
            found[middle.saved] = middle
            waiting += [(left, middle), (middle, right)]
        return pareto(list(found.values()))


def pareto(cuts: Sequence[Cut]) -> list[Cut]:
    """Those that no other beats in both seconds and weight, fastest first."""
    best: list[Cut] = []
    for cut in sorted(cuts, key=lambda c: (c.seconds, c.weight)):
        if not best or cut.weight < best[-1].weight:
            best.append(cut)
    return best
