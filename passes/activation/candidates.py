"""Candidate choices from the fastest to the smallest: best cuts for all prices, and mixtures of neighbours by layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .blocks import Block
from .cut import Cut
from .simulate import Simulation, Simulator


@dataclass(frozen=True)
class Candidate:
    """A set of saved values with what the simulator says about it. ``seconds``: recomputation, and writing what would
    not be written otherwise."""

    saved: frozenset[int]
    peak: int
    seconds: float
    simulation: Simulation


def evaluate(simulator: Simulator, saved: frozenset[int]) -> Candidate:
    run = simulator.run(saved)
    written = sum(simulator.problem.values[v].keep_seconds for v in run.saved)
    return Candidate(run.saved, run.peak, run.extra_seconds + written, run)


def staircase(simulator: Simulator, cuts: list[Cut], blocks: tuple[Block, ...]) -> list[Candidate]:
    """Between two neighbouring cuts the layers change over one by one, those that run first in the forward first: their
    backward comes last, when least else is held."""
    found: dict[frozenset[int], Candidate] = {}

    def add(saved: frozenset[int]) -> None:
        if saved not in found:
            found[saved] = evaluate(simulator, saved)

    for cut in cuts:
        add(cut.saved)
    for left, right in itertools.pairwise(cuts):
        moved = left.saved ^ right.saved
        current = set(left.saved)
        for block in blocks:
            change = moved & set(block.values)
            if change:
                current = (current - change) | (right.saved & change)
                add(frozenset(current))
    return pareto(list(found.values()))


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both time and peak, fastest first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.seconds, c.peak, sorted(c.saved))):
        if not best or candidate.peak < best[-1].peak:
            best.append(candidate)
    return best
