"""Candidate choices from the fastest to the smallest: best cuts for all prices, and mixtures of neighbours by layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import Block
from .cut import Cut
from .problem import Value
from .simulate import Simulation, Simulator
from .token_shares import QUARTERS, Shares

#: What is saved, what is swapped, and of what only some tokens are.
Key = tuple[frozenset[int], frozenset[int], Shares]


@dataclass(frozen=True)
class Candidate:
    """A set of saved values with what the simulator says about it. ``seconds``: recomputation, writing what would not
    be written otherwise, and what copies to the host take from the step."""

    saved: frozenset[int]
    peak: int
    seconds: float
    simulation: Simulation
    swapped: frozenset[int] = frozenset()
    #: Of ``swapped``, the values that are swapped for some tokens and computed again for the others.
    shares: Shares = frozenset()

    @property
    def key(self) -> Key:
        """What tells choices apart."""
        return self.saved, self.swapped, self.shares

    def bytes_away(self, values: Sequence[Value]) -> int:
        """Bytes that are on the host between forward and backward."""
        return sum(bytes_on_host(values[v], self.shares) for v in self.swapped)


def bytes_on_host(value: Value, shares: Shares) -> int:
    """Bytes of a swapped value that leave the device."""
    quarters = next((q for v, q in shares if v == value.id), QUARTERS)
    return value.bytes * quarters // QUARTERS


def evaluate(
    simulator: Simulator,
    saved: frozenset[int],
    swapped: frozenset[int] = frozenset(),
    shares: Shares = frozenset(),
) -> Candidate:
    """A choice with its peak and its price."""
    run = simulator.run(saved, swapped, shares)
    written = sum(simulator.problem.values[v].keep_seconds for v in run.saved | run.swapped)
    seconds = run.extra_seconds + written + run.stall
    return Candidate(run.saved, run.peak, seconds, run, run.swapped, run.shares)


#: About how many mixtures of neighbouring cuts are simulated.
MIXTURES = 128


def staircase(simulator: Simulator, cuts: list[Cut], blocks: tuple[Block, ...]) -> list[Candidate]:
    """Between two neighbouring cuts the layers change over one by one (or, of deep models, a few at a time), those that
    run first in the forward first: their backward comes last, when least else is held."""
    found: dict[Key, Candidate] = {}

    def add(saved: frozenset[int], swapped: frozenset[int]) -> None:
        key = (saved, swapped, frozenset[tuple[int, int]]())
        if key not in found:
            found[key] = evaluate(simulator, saved, swapped)

    for cut in cuts:
        add(*cut.key)
    at_once = max(1, -(-len(blocks) * (len(cuts) - 1) // MIXTURES))
    for left, right in itertools.pairwise(cuts):
        moved = (left.saved ^ right.saved) | (left.swapped ^ right.swapped)
        saved, swapped = left.key
        changes = [change for block in blocks if (change := moved & frozenset(block.values))]
        for begin in range(0, len(changes), at_once):
            change = frozenset().union(*changes[begin : begin + at_once])
            saved = (saved - change) | (right.saved & change)
            swapped = (swapped - change) | (right.swapped & change)
            add(saved, swapped)
    return pareto(list(found.values()))


def order(candidate: Candidate) -> tuple[float, int, list[int], list[int], list[tuple[int, int]]]:
    """Fastest first, of equals the smaller."""
    c = candidate
    return c.seconds, c.peak, sorted(c.saved), sorted(c.swapped), sorted(c.shares)


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both time and peak, fastest first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=order):
        if not best or candidate.peak < best[-1].peak:
            best.append(candidate)
    return best
