"""The output layer and its loss as a cascade, and what its split over devices exchanges.

The cascade reduces over the vocabulary v. Split over devices, each reduction is a local one and a collective; how often
devices must wait for each other is how often the cascade walks over v:

- *two barriers*: the loss's reductions (maximum, sum of exponentials, the target's logit) are one traversal after
  rewriting, and so one exchange of their monoid's state; the gradient of the input is a second reduction, which needs
  the first one's results;
- *one barrier*: rewriting moves the gradient into the first traversal too. Its state is two more sums, of
  ``exp(Z - MX) W`` and of the target's row of W, and one exchange gives everything.

What is sent for a component is its ``carry``: the local value as it counts once the references are the merged ones
(``SE * exp(MX_local - MX)``), combined over the devices by the component's own reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ScheduleError
from ...ir.cascade import Einsum, accesses, tensor_name
from ...ir.cascade_parser import parse_cascade
from ...ir.monoid import Component, Monoid
from ..rewrite_cascade import rewrite

#: t tokens, d the hidden state, v the vocabulary; T the target's index, H the input, W the output matrix.
_LOSS = """
Z[t,v] = sum[d] H[t,d] * W[v,d]
MX[t]  = max[v] Z[t,v]
SE[t]  = sum[v] exp(Z[t,v] - MX[t])
ZT[t]  = sum[v] where(v == T[t], Z[t,v], 0)
"""
_SMOOTHED = """
ZS[t]  = sum[v] Z[t,v]
"""
_GRADIENT = """
DH[t,d] = sum[v] (exp(Z[t,v] - MX[t]) / SE[t] - {right} * where(v == T[t], 1, 0){rest}) * W[v,d]
"""
_WEIGHT = """
DW[v,d] = sum[t] G[t] * (exp(Z[t,v] - MX[t]) / SE[t] - {right} * where(v == T[t], 1, 0){rest}) * H[t,d]
"""


@dataclass(frozen=True)
class OutputCascade:
    """``logits``, ``weight`` (gradient of W): local, every element of v stays on its device. ``meetings``: one a
    barrier, in order: the monoid whose state is exchanged, its ``finals`` giving the results (MX, SE, ZT, DH)."""

    logits: Einsum
    meetings: tuple[Monoid, ...]
    weight: Einsum
    label_smoothing: float


def output_cascade(vocabulary: str, label_smoothing: float = 0.0) -> OutputCascade:
    """The cascade of ``two-barriers`` or ``one-barrier``. Raises ScheduleError for another kind, or when rewriting does
    not bring the reductions into as few traversals as the kind has barriers."""
    if vocabulary not in ("one-barrier", "two-barriers"):
        raise ScheduleError(f"vocabulary passes {vocabulary!r} are unknown", remedy="one-barrier or two-barriers")
    smoothed = {
        "right": repr(1.0 - label_smoothing),
        "rest": f" - {label_smoothing!r} / |v|" if label_smoothing else "",
    }
    loss = _LOSS + (_SMOOTHED if label_smoothing else "")
    gradient, weight = _GRADIENT.format(**smoothed), _WEIGHT.format(**smoothed)
    whole = parse_cascade(loss + gradient + weight)
    if vocabulary == "one-barrier":
        meetings: tuple[Monoid, ...] = (_traversal(loss + gradient),)
    else:
        direction = whole.definitions["DH"]
        component = Component("DH_run", (direction.indices[0], direction.indices[1]), "sum", (), direction.body,
                              _old("DH_run", direction))  # fmt: skip
        first = _traversal(loss)
        meetings = (first, Monoid(first.rank, (component,), (_final("DH", component, first),)))
    return OutputCascade(whole.definitions["Z"], meetings, whole.definitions["DW"], label_smoothing)


def _traversal(text: str) -> Monoid:
    """All reductions over v of a cascade as one monoid."""
    import sympy

    cascade = parse_cascade(text)
    rewritten = rewrite(cascade)
    rank = sympy.Symbol("v")
    monoids = [monoid for monoid in rewritten.monoids if monoid.rank.name == "v"]
    if len(monoids) != 1:
        raise ScheduleError(
            f"the cascade walks over the vocabulary in {len(monoids)} separate traversals",
            remedy="take two-barriers",
        )
    monoid = monoids[0]
    components, finals = list(monoid.components), list(monoid.finals)
    known = {final.output for final in finals}
    for einsum in cascade.einsums:  # sums that depend on nothing are monoids as they are
        if einsum.reduction and any(symbol.name == "v" for symbol in einsum.reduced) and einsum.output not in known:
            if any(tensor_name(item) in known for item in einsum.reads):
                raise ScheduleError(
                    f"{einsum.output} needs a traversal of its own over {rank}", remedy="take two-barriers"
                )
            name = f"{einsum.output}_run"
            component = Component(name, tuple(einsum.indices), einsum.reduction, (), einsum.body, _old(name, einsum))
            components.append(component)
            finals.insert(0, _final(einsum.output, component, monoid))
    return Monoid(monoid.rank, tuple(components), tuple(finals))


def _old(name: str, einsum: Einsum) -> object:
    from ...ir.cascade import access

    rank = next(symbol for symbol in einsum.reduced if symbol.name == "v")
    return access(name, (*einsum.indices, rank))


def _final(name: str, component: Component, monoid: Monoid) -> Einsum:
    from ...ir.monoid import LAST, state

    return Einsum(name, component.indices, state(component, monoid.rank, LAST))


def reads(monoid: Monoid) -> frozenset[str]:
    """The tensors that the elements of a monoid read from outside it."""
    found = {tensor_name(item) for component in monoid.components for item in accesses(component.element)}
    return frozenset(found - monoid.names)
