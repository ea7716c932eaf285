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

from ...errors import CascadeError, ScheduleError
from ...ir.cascade import Einsum, accesses, rank, tensor_name
from ...ir.cascade_parser import parse_cascade
from ...ir.monoid import Monoid
from .split_cascade import final, running, traversal

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
        first = _traversal(loss)
        component = running(direction, first.rank)
        meetings = (first, Monoid(first.rank, (component,), (final("DH", component, first.rank),)))
    return OutputCascade(whole.definitions["Z"], meetings, whole.definitions["DW"], label_smoothing)


def _traversal(text: str) -> Monoid:
    """All reductions over v of a cascade as one monoid."""
    try:
        return traversal(parse_cascade(text), rank("v"))
    except CascadeError as error:
        raise ScheduleError(error.message, where=error.where, remedy="take two-barriers") from error


def reads(monoid: Monoid) -> frozenset[str]:
    """The tensors that the elements of a monoid read from outside it."""
    found = {tensor_name(item) for component in monoid.components for item in accesses(component.element)}
    return frozenset(found - monoid.names)
