"""A cascade's reductions over one rank as one monoid: what is exchanged where that rank is split over devices.

The vocabulary of an output layer and the keys of an attention are such ranks. After rewriting, all reductions over the
rank share a traversal; their combined state is a monoid, and the states of the devices' parts are merged in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ...errors import CascadeError
from ...ir.cascade import Cascade, Einsum, access, tensor_name
from ...ir.monoid import LAST, Component, Monoid, state
from ..rewrite_cascade import rewrite


@dataclass(frozen=True)
class SplitCascade:
    """``before``: what each element of the rank needs, computed where the element lies. ``monoid``: the state; its
    ``finals`` give the results. ``after``: what follows from these."""

    before: tuple[Einsum, ...]
    monoid: Monoid
    after: tuple[Einsum, ...]


def traversal(cascade: Cascade, rank: sympy.Symbol) -> Monoid:
    """All reductions over ``rank`` of a cascade as one monoid. Raises CascadeError where they need several traversals,
    which is as many as there would be exchanges."""
    return _merged(cascade, rank)[0]


def split_cascade(cascade: Cascade, rank: sympy.Symbol) -> SplitCascade:
    """``traversal`` with what stands before and behind it. Raises CascadeError as that does, and for an output that is
    not reduced over the rank."""
    monoid, rewritten = _merged(cascade, rank)
    finals = {final.output for final in monoid.finals}
    before: list[Einsum] = []
    after: list[Einsum] = []
    behind = set(finals)
    for einsum in rewritten.einsums:
        if einsum.output in finals | monoid.names or einsum.iterative is not None:
            continue
        reads = {tensor_name(item) for item in einsum.reads}
        if not reads & behind:
            before.append(einsum)
            continue
        if rank in einsum.space:
            raise CascadeError(
                f"{einsum.output} walks over {rank} once more", where=einsum.output,
                remedy="its reductions over that rank need one traversal",
            )  # fmt: skip
        behind.add(einsum.output)
        after.append(einsum)
    return SplitCascade(tuple(before), monoid, tuple(after))


def _merged(cascade: Cascade, rank: sympy.Symbol) -> tuple[Monoid, Cascade]:
    """The monoid, and the rewritten cascade that it comes from."""
    rewritten = rewrite(cascade)
    monoids = [monoid for monoid in rewritten.monoids if monoid.rank == rank]
    if len(monoids) > 1:
        raise CascadeError(
            f"the cascade walks over {rank} in {len(monoids)} separate traversals", where=str(rank),
            remedy="split it into parts that are exchanged one after the other",
        )  # fmt: skip
    whole = monoids[0] if monoids else Monoid(rank, ())
    components, finals = list(whole.components), list(whole.finals)
    known = {final.output for final in finals}
    for einsum in rewritten.cascade.einsums:  # those that depend on nothing are monoids as they are
        if not einsum.reduction or rank not in einsum.reduced:
            continue
        if any(tensor_name(item) in known for item in einsum.reads):
            raise CascadeError(
                f"{einsum.output} needs a traversal of its own over {rank}", where=einsum.output,
                remedy="split the cascade into parts that are exchanged one after the other",
            )  # fmt: skip
        component = running(einsum, rank)
        components.append(component)
        finals.insert(0, final(einsum.output, component, rank))
        known.add(einsum.output)
    return Monoid(rank, tuple(components), tuple(finals)), rewritten.cascade


def running(einsum: Einsum, rank: sympy.Symbol) -> Component:
    """A reduction over ``rank`` that depends on no other, as a component of its own."""
    name = f"{einsum.output}_run"
    inner = tuple(symbol for symbol in einsum.reduced if symbol != rank)
    return Component(
        name, tuple(einsum.indices), einsum.reduction, inner, einsum.body, access(name, (*einsum.indices, rank))
    )


def final(name: str, component: Component, rank: sympy.Symbol) -> Einsum:
    """The tensor ``name`` is the component's last value."""
    return Einsum(name, component.indices, state(component, rank, LAST))
