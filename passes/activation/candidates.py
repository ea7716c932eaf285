"""Candidate choices from the fastest to the smallest: best cuts for all prices, and mixtures of neighbours by layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .blocks import Block
from .cut import Cut
from .simulate import Simulation, Simulator


@dataclass(frozen=True)
class Candidate:
    """A set of saved values with what the simulator says about it. ``seconds``: recomputation, writing what would not
    be written otherwise, and what copies to the host take from the step."""

    saved: frozenset[int]
    peak: int
    seconds: float
    simulation: Simulation
    swapped: frozenset[int] = frozenset()

    @property
    def key(self) -> tuple[frozenset[int], frozenset[int]]:
        """What tells choices apart."""
        return self.saved, self.swapped


def evaluate(simulator: Simulator, saved: frozenset[int], swapped: frozenset[int] = frozenset()) -> Candidate:
    """A choice with its peak and its price."""
    run = simulator.run(saved, swapped)
    written = sum(simulator.problem.values[v].keep_seconds for v in run.saved | run.swapped)
    return Candidate(run.saved, run.peak, run.extra_seconds + written + run.stall, run, run.swapped)


def staircase(simulator: Simulator, cuts: list[Cut], blocks: tuple[Block, ...]) -> list[Candidate]:
    """Between two neighbouring cuts the layers change over one by one, those that run first in the forward first: their
    backward comes last, when least else is held."""
    found: dict[tuple[frozenset[int], frozenset[int]], Candidate] = {}

    def add(saved: frozenset[int], swapped: frozenset[int]) -> None:
        if (saved, swapped) not in found:
            found[saved, swapped] = evaluate(simulator, saved, swapped)

    for cut in cuts:
        add(*cut.key)
    for left, right in itertools.pairwise(cuts):
        moved = (left.saved ^ right.saved) | (left.swapped ^ right.swapped)
        saved, swapped = left.key
        for block in blocks:
            change = moved & frozenset(block.values)
            if change:
                saved = (saved - change) | (right.saved & change)
                swapped = (swapped - change) | (right.swapped & change)
                add(saved, swapped)
    return pareto(list(found.values()))


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both time and peak, fastest first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.seconds, c.peak, sorted(c.saved), sorted(c.swapped))):
        if not best or candidate.peak < best[-1].peak:
            best.append(candidate)
    return best
