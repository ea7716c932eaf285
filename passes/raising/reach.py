"""Which values kernels could have among their results, told from the components alone: a small part of the time that
working them out takes."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.cascade import Einsum
from .candidates import MAX_CORE
from .components import Space, components, outer_ranks
from .emit import elements
from .own_copies import with_own_copies
from .raise_graph import Raised


def within_reach(raised: Raised, groups: Sequence[Sequence[str]]) -> tuple[bool, ...]:
    """For each group of graph values, whether all of them could be what kernels compute: in the core of a component
    that is not too large, or cheap enough to be done with one. (What is only taken in because nothing else could
    compute it is not foreseen.)"""
    copied = with_own_copies(raised)
    leaves = {name: elements(tensor.sizes) for name, tensor in copied.tensors.items()}
    space = Space(copied.cascade.einsums, copied.sizes, leaves)
    inside: set[str] = set()
    for component in components(space):
        if len(component.core) <= MAX_CORE:
            inside.update(component.core)

    def near(value: str) -> bool:
        einsum = space.writer.get(copied.tensor_of.get(value, ""))
        return einsum is not None and (einsum.output in inside or _may_be_glue(einsum, space))

    return tuple(all(map(near, group)) for group in groups)


def _may_be_glue(einsum: Einsum, space: Space) -> bool:
    """As ``stages`` asks, of whatever it reads: whether that has all of its ranks, and it is no product of two."""
    return outer_ranks(einsum, space.sizes) is None and any(einsum.space <= ranks for _, ranks in einsum.read_ranks)
