"""Numeric values of a monoid: the state of a block of the fiber, the merge of two states, and the results at the end.

This is the split form of a streamed reduction: any blocks, merged in any tree, give what the loop gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy

from .cascade_interpreter import Array, Space, reduce_body
from .monoid import Component, Monoid

State = dict[str, Array]


def block_state(
    monoid: Monoid, tensors: Mapping[str, Array], sizes: Mapping[str, int], block: Array, dtype: Any = np.float64
) -> State:
    """The state of the elements at the coordinates ``block`` of the monoid's rank.

    ``tensors`` holds what the elements read; ``sizes`` every rank's whole size.
    """
    state: State = {}
    for component in monoid.components:
        reduced = () if component.reduction is None else (monoid.rank, *component.inner)
        element = monoid.rename(component.element, "", "")
        value = _evaluate(
            component, element, component.reduction, reduced, {**tensors, **state}, sizes, {monoid.rank: block}, dtype
        )
        state[component.name] = value
    return state


def merge_states(
    monoid: Monoid,
    left: State,
    right: State,
    tensors: Mapping[str, Array],
    sizes: Mapping[str, int],
    dtype: Any = np.float64,
) -> State:
    """The state of two parts of a fiber together."""
    state: State = {}
    for component in monoid.components:
        values = {**tensors, **state}
        values.update({f"left.{name}": value for name, value in left.items()})
        values.update({f"right.{name}": value for name, value in right.items()})
        merged = monoid.merge(component, "left.", "right.")
        state[component.name] = _evaluate(component, merged, None, (), values, sizes, {}, dtype)
    return state


def results(
    monoid: Monoid, state: State, tensors: Mapping[str, Array], sizes: Mapping[str, int], dtype: Any = np.float64
) -> dict[str, Array]:
    """The tensors that the monoid's last state gives."""
    found: dict[str, Array] = {}
    for einsum in monoid.finals:
        values = {**tensors, **found, **state}
        body = monoid.rename(einsum.body, "", "")
        coordinates = {symbol: np.arange(sizes[symbol.name]) for symbol in einsum.kept}
        found[einsum.output] = reduce_body(body, None, einsum.kept, (), values, Space((), coordinates, sizes), dtype)
    return found


def _evaluate(
    component: Component,
    e: sympy.Expr,
    reduction: str | None,
    reduced: tuple[sympy.Symbol, ...],
    tensors: Mapping[str, Array],
    sizes: Mapping[str, int],
    walked: Mapping[sympy.Symbol, Array],
    dtype: Any,
) -> Array:
    coordinates = {symbol: np.arange(sizes[symbol.name]) for symbol in (*component.indices, *component.inner)}
    space = Space((), {**coordinates, **walked}, sizes)
    return reduce_body(e, reduction, component.indices, reduced, tensors, space, dtype)
