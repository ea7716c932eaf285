"""What others would keep, for comparison: checkpoints at every k-th layer, the cut with one layer rounded, and MEMO's
share of tokens."""

from __future__ import annotations

from .candidates import Candidate, evaluate
from .host_link import HostLink
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


def memo_share(always: int, others: int, layers: int, layer_seconds: float, link: HostLink) -> float:
    """MEMO's alpha: of ``others``, the bytes that a layer saves besides its input and the attention's result
    (``always``, which go to the host whole), the share of tokens that goes there too; the rest is computed again.

    As published: the largest alpha with ``always + alpha others`` copied within the forward of one layer
    (``layer_seconds``), and the host holding that of all layers but the last two, whose backward comes at once.
    Negative where not even ``always`` fits. (Zhao et al., MEMO, 2024, arXiv 2407.12117, section 4.1.)
    """
    in_time = layer_seconds * link.out - always
    in_room = link.capacity / max(1, layers - 2) - always
    return min(1.0, in_time / others, in_room / others)
