"""A rewritten cascade as values that depend on each other: the form from which kernels are cut.

Iterative tensors become *states*. In expressions, ``S[m]`` is the state at the end of its fiber, ``S_prev[m]`` before a
step and ``S_next[m]`` after it. The iterative rank itself is gone from their indices: it is what a loop walks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import IDENTITY, Cascade, Einsum, access, accesses, ranks_of, size, tensor_name
from ...ir.monoid import Component, Monoid
from .errors import NotLowerable


@dataclass(frozen=True)
class Value:
    """A computed tensor.

    ``reduction`` and ``reduced``: as an Einsum's (the streamed rank first, for a state). ``carry`` is what an old
    state is worth after a step, for a state of a monoid; ``recurrence`` marks a state whose ``body`` is the whole new
    value, one coordinate at a time. ``initial`` is a state's value before the first step.
    """

    name: str
    indices: tuple[sympy.Symbol, ...]
    body: sympy.Expr
    reduction: str | None = None
    reduced: tuple[sympy.Symbol, ...] = ()
    carry: sympy.Expr | None = None
    recurrence: bool = False
    initial: sympy.Expr = sympy.S.Zero

    @property
    def is_map(self) -> bool:
        """Neither a reduction nor a state."""
        return not self.reduced

    @property
    def is_state(self) -> bool:
        return self.carry is not None or self.recurrence


def previous(name: str) -> str:
    return f"{name}_prev"


def following(name: str) -> str:
    return f"{name}_next"


@dataclass(frozen=True)
class Dataflow:
    """All values by name, in an order in which each follows what it reads; and the names of the inputs."""

    values: Mapping[str, Value]
    inputs: Mapping[str, int]

    def value(self, item: AppliedUndef) -> Value | None:
        """The computed tensor that an access reads; None for an input and for a state inside a step."""
        return self.values.get(tensor_name(item))

    def state(self, item: AppliedUndef) -> Value | None:
        """The state that ``S_prev`` or ``S_next`` reads."""
        name = tensor_name(item)
        for suffix in ("_prev", "_next"):
            found = self.values.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
            if found is not None and found.is_state:
                return found
        return None


def dataflow(cascade: Cascade, monoids: Iterable[Monoid]) -> Dataflow:
    """Read a cascade as ``passes.rewrite_cascade.rewrite`` leaves it, with the monoids of its iterative tensors."""
    components: dict[str, tuple[Monoid, Component]] = {}
    for monoid in monoids:
        components.update({component.name: (monoid, component) for component in monoid.components})
    iterative = _iterative_positions(cascade)
    values: dict[str, Value] = {}
    starts: dict[str, sympy.Expr] = {}
    for einsum in cascade.einsums:
        if einsum.is_start:
            starts[einsum.output] = einsum.body
    for einsum in cascade.einsums:
        if einsum.is_start:
            continue
        name = einsum.output
        if name in iterative and name in components:
            values[name] = _component_value(*components[name], iterative)
        elif name in iterative:
            values[name] = _recurrence(einsum, starts[name], iterative)
        else:
            body = _without_iterative(einsum.body, iterative)
            start = IDENTITY[einsum.reduction] if einsum.reduction else sympy.Integer(0)
            values[name] = Value(name, einsum.kept, body, einsum.reduction, einsum.reduced, initial=start)
    for name in iterative:
        for other in (previous(name), following(name)):
            if other in cascade.tensors:
                raise NotLowerable(f"the name {other} is taken", where=name)
    inputs = {
        tensor_name(item): len(item.args)
        for einsum in cascade.einsums
        for item in einsum.reads
        if tensor_name(item) not in cascade.definitions
    }
    return Dataflow(values, inputs)


def _iterative_positions(cascade: Cascade) -> dict[str, tuple[int, sympy.Symbol]]:
    """Iterative tensor -> (position of the iterative index, its rank)."""
    found: dict[str, tuple[int, sympy.Symbol]] = {}
    for einsum in cascade.einsums:
        rank = einsum.iterative
        if rank is not None and not einsum.is_start:
            position = next(p for p, index in enumerate(einsum.indices) if index == rank + 1)
            found[einsum.output] = (position, rank)
    return found


def _component_value(monoid: Monoid, part: Component, iterative: Mapping[str, tuple[int, sympy.Symbol]]) -> Value:
    body, carry = (_without_iterative(e, iterative) for e in (part.element, part.carry))
    reduced = (monoid.rank, *part.inner)
    return Value(part.name, part.indices, body, part.reduction, reduced, carry, initial=part.identity)


def _recurrence(einsum: Einsum, start: sympy.Expr, iterative: Mapping[str, tuple[int, sympy.Symbol]]) -> Value:
    rank = einsum.iterative
    assert rank is not None
    if einsum.reduction is not None or ranks_of(start):
        raise NotLowerable("a recurrence with a reduction, or a start that depends on a rank", where=einsum.output)
    indices = tuple(symbol for symbol in einsum.kept if symbol != rank)
    body = _without_iterative(einsum.body, iterative)
    return Value(einsum.output, indices, body, None, (rank,), recurrence=True, initial=start)


def _without_iterative(e: sympy.Expr, iterative: Mapping[str, tuple[int, sympy.Symbol]]) -> sympy.Expr:
    """Accesses to iterative tensors as states: before a step, after it, or at the end."""
    table = {}
    for item in accesses(e):
        name = tensor_name(item)
        if name not in iterative:
            continue
        position, rank = iterative[name]
        at, rest = item.args[position], tuple(a for p, a in enumerate(item.args) if p != position)
        if at == rank:
            table[item] = access(previous(name), rest)
        elif at == rank + 1:
            table[item] = access(following(name), rest)
        elif at == size(rank.name):
            table[item] = access(name, rest)
        else:
            raise NotLowerable(f"{name} is read at {at}, neither a step nor the end", where=name)
    return e.xreplace(table)
