"""The state of a split reduction as torch tensors: of the elements that lie here, merged over devices, and its results.

``ir.monoid`` says what a state is, and ``ir.monoid_interpreter`` gives the same in numpy.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from sympy.core.function import AppliedUndef

from ..codegen.einsums import Values, reduce
from ..ir.monoid import Component, Monoid

#: Reduces a tensor over all devices with "max", "min" or "sum", and returns it.
AllReduce = Callable[[torch.Tensor, str], torch.Tensor]
State = dict[str, torch.Tensor]


def local_state(monoid: Monoid, values: Values) -> State:
    """The state of the elements that lie here."""
    state: State = {}
    for component in monoid.components:
        element = monoid.rename(component.element, "", "")
        reduced = () if component.reduction is None else (monoid.rank, *component.inner)
        state[component.name] = reduce(
            element, component.reduction, component.indices, reduced, values.with_tensors(state)
        )
    return state


def merge_pair(monoid: Monoid, left: State, right: State, values: Values) -> State:
    """The state of two parts together."""
    known = values.with_tensors({f"left.{name}": value for name, value in left.items()})
    known = known.with_tensors({f"right.{name}": value for name, value in right.items()})
    state: State = {}
    for component in monoid.components:
        merged = monoid.merge(component, "left.", "right.")
        state[component.name] = reduce(merged, None, component.indices, (), known.with_tensors(state))
    return state


def merge(monoid: Monoid, local: State, values: Values, all_reduce: AllReduce) -> State:
    """The state of all devices. Components that are reduced alike and wait for no other travel together."""
    known = values.with_tensors({f"local.{name}": value for name, value in local.items()})
    merged: State = {}
    waiting = list(monoid.components)
    while waiting:
        ready: list[tuple[Component, sympy.Expr]] = []
        for component in waiting:
            carry = monoid.rename(component.carry, "local.", "")
            needs = {str(item.func) for item in carry.atoms(AppliedUndef)} - set(known.tensors)
            if not needs and (not ready or ready[0][0].reduction == component.reduction):
                ready.append((component, carry))
        parts = [reduce(carry, None, component.indices, (), known).contiguous() for component, carry in ready]
        operation = ready[0][0].reduction
        assert operation is not None
        flat = all_reduce(torch.cat([part.flatten() for part in parts]), operation)
        for (component, _), part, value in zip(
            ready, parts, torch.split(flat, [part.numel() for part in parts]), strict=True
        ):
            merged[component.name] = value.reshape(part.shape)
        known = known.with_tensors(merged)
        waiting = [component for component in waiting if component.name not in merged]
    return merged


def results(monoid: Monoid, state: State, values: Values) -> Values:
    """The tensors that the last state gives, beside those that are known."""
    known = values.with_tensors(state)
    for final in monoid.finals:
        body = monoid.rename(final.body, "", "")
        known = known.with_tensors({final.output: reduce(body, None, final.indices, (), known)})
    return Values({name: value for name, value in known.tensors.items() if name not in state}, known.first, known.sizes)
