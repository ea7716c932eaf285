"""What others would keep, for comparison: checkpoints at every k-th layer, and the cut with one layer rounded."""

from __future__ import annotations

from .candidates import Candidate, evaluate
from .search import ActivationSearch


def uniform_checkpointing(search: ActivationSearch, every: int) -> Candidate:
    """Only what passes between layers is kept, at every ``every``-th one (Chen et al. 2016); the backward runs the
    layers between two checkpoints again. Other than in eager mode, what may not run twice is kept as well."""
    crossing = search.crossing
    saved: set[int] = set()
    for block in search.blocks:
        if block.position % every == 0:
            saved |= crossing & set(block.values)
    return evaluate(search.simulator, frozenset(saved))


def greedy(search: ActivationSearch, limit: int) -> Candidate | None:
    """The relaxation's answer, rounded: best cuts for one price, with layers changed over one by one."""
    fitting = [candidate for candidate in search.steps if candidate.peak <= limit]
    return min(fitting, key=lambda c: (c.seconds, c.peak), default=None)
