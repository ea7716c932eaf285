"""The combined state of a split reduction: one object for every place where a fiber is split.

A reduction over rank r whose summand depends on other reductions over r keeps a *state*: components such as a running
maximum and sums relative to it. The state is a monoid: merging the states of two parts of a fiber gives the state of
the whole. Where the state lives is the schedule's choice: in registers along a loop (online softmax, Welford), across
blocks (FlashDecoding), across chunks in time, across devices.

``carry`` says what an old component is worth once the references have moved, so that::

    merge(left, right):  new_i = carry_i(left, new) (+) carry_i(right, new)        in component order
    step(state, x):      new_i = carry_i(state, new) (+) element_i(x, new)

with (+) the component's reduction. In expressions, ``NAME[..., r]`` is the old value, ``NAME[..., r+1]`` the new one
and ``NAME[..., |r|]`` the last one, so a component is also two lines of cascade text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from .cascade import IDENTITY, Einsum, Maximum, Minimum, access, accesses, size, tensor_name

#: Positions of a component's streamed index: before the step, after it, and at the end of the fiber.
OLD, NEW, LAST = "old", "new", "last"


@dataclass(frozen=True)
class Component:
    """One part of the state.

    ``reduction`` is sum, max or min; None for a *reference* that is computed from the new components (a running mean).
    ``indices`` are its ranks without the streamed one. ``inner`` are further ranks that one element reduces.
    ``element`` is the share of one element of the fiber, or a reference's value. ``carry`` reads old and new values.
    """

    name: str
    indices: tuple[sympy.Symbol, ...]
    reduction: str | None
    inner: tuple[sympy.Symbol, ...]
    element: sympy.Expr
    carry: sympy.Expr

    @property
    def identity(self) -> sympy.Expr:
        return IDENTITY[self.reduction] if self.reduction else sympy.Integer(0)


@dataclass(frozen=True)
class Monoid:
    """The state of all reductions over one rank that share a traversal. ``finals`` turn the last state into results."""

    rank: sympy.Symbol
    components: tuple[Component, ...]
    finals: tuple[Einsum, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(component.name for component in self.components)

    def merge(self, component: Component, left: str, right: str) -> sympy.Expr:
        """The merged value of one component, reading parts ``left`` and ``right`` and merged values (suffix ``""``).

        Accesses to old values read tensors named ``left + name`` and ``right + name``; new ones read ``name``.
        """
        if component.reduction is None:
            return self.rename(component.element, "", "")
        parts = [self.rename(component.carry, side, "") for side in (left, right)]
        return join(component.reduction, parts[0], parts[1])

    def rename(self, expression: sympy.Expr, old: str, new: str) -> sympy.Expr:
        """Drop the streamed index of every state access; prefix the tensor with ``old`` or ``new``."""
        table = {}
        for item in accesses(expression):
            if tensor_name(item) in self.names:
                prefix = new if item.args[-1] == self.rank + 1 else old
                table[item] = access(prefix + tensor_name(item), item.args[:-1])
        return expression.xreplace(table)


def join(reduction: str, left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    """``left (+) right``."""
    build: dict[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
        "sum": lambda a, b: a + b,
        "prod": lambda a, b: a * b,
        "max": Maximum,
        "min": Minimum,
    }
    return build[reduction](left, right)


def state(component: Component, rank: sympy.Symbol, when: str) -> AppliedUndef:
    """The component's value before a step, after it, or at the end of the fiber."""
    at = {OLD: rank, NEW: rank + 1, LAST: size(rank.name)}[when]
    return access(component.name, (*component.indices, at))


def loop_form(component: Component, r: sympy.Symbol) -> list[Einsum]:
    """One component as cascade text: an iterative rank, one element a step.

    rewrite: component -> ``NAME[i,0] = identity``; ``NAME[i,r+1] = carry (+) element``, with the element's further
    ranks reduced in a line of their own first.
    """
    lines: list[Einsum] = []
    element = component.element
    if component.inner:
        part = part_name(component.name)
        lines.append(Einsum(part, (*component.indices, r), element, component.reduction, component.inner))
        element = access(part, (*component.indices, r))
    body = element if component.reduction is None else join(component.reduction, component.carry, element)
    lines.append(Einsum(component.name, (*component.indices, sympy.Integer(0)), component.identity))
    lines.append(Einsum(component.name, (*component.indices, r + 1), body))
    return lines


def part_name(name: str) -> str:
    """The tensor that holds one element's share of a component, where that share is a reduction itself."""
    return f"{name}_part"
