"""Turning the terms of a separable summand into components of a monoid's state, in a numerically sound way.

A term ``d * x * exp(a + b) * prod (a_i + b_i)**p_i`` (d, b, b_i not varying along the fiber) becomes sums that never
read an unfinished d. They are kept relative to *references* which the fiber itself provides:

- for the exponential, the running maximum M of a: every ``exp(a - M)`` is at most 1, and moving to a new M multiplies
  by ``exp(M - M')``, at most 1 as well (online softmax);
- for ``a_i + b_i``, the running mean c of a_i, weighted by the term's positive weights: ``(a_i - c)**q`` for all q <=
  p_i is closed under moving c, by the binomial theorem (Chan, Golub and LeVeque's merge of variances). If a_i is also
  the exponent, M serves as c.

At the end the distance from the reference to the true b is applied once: ``exp(M + b)`` and ``(b_i + c)**(p - q)``.
These are as large as the original summand makes them: ``exp(M + b)`` is the original's own largest term, and
``sum w|a - mean| <= 2 sum w|a + b|`` for any b. Everything else in d is deferred.

rewrite: ``R = sum[r] f(x, d)``  ->  components (state of the monoid) and ``R = final expression``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product as cartesian

import sympy

from ..ir.cascade import Equal, Less, Where, accesses, ranks_of, size, tensor_name
from ..ir.monoid import LAST, NEW, OLD, Component, state
from .intervals import Interval, interval
from .separable_rank import Affine, Term, masked

_INFINITY = sympy.oo


@dataclass(frozen=True)
class Reference:
    """What sums are kept relative to: ``scale * component`` (a maximum), or a running mean's component."""

    component: Component
    scale: sympy.Expr = sympy.S.One

    def at(self, rank: sympy.Symbol, when: str) -> sympy.Expr:
        return self.scale * state(self.component, rank, when)


@dataclass
class Registry:
    """The components of all reductions over ``rank`` that share one traversal, found again by content.

    ``running`` names the components whose value is needed during the traversal. ``alias`` maps a component to the
    tensor that is equal to its last value. ``values`` maps a tensor to its value in terms of last states.
    """

    rank: sympy.Symbol
    fresh: Callable[[str], str]
    leaf: Callable[[sympy.Expr], Interval]
    components: dict[tuple[object, ...], Component] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    references: dict[str, tuple[Component, Component, Component]] = field(default_factory=dict)

    def last(self, component: Component) -> sympy.Expr:
        return state(component, self.rank, LAST)

    def add(
        self,
        hint: str,
        reduction: str,
        reduced: tuple[sympy.Symbol, ...],
        key: tuple[object, ...],
        element: sympy.Expr,
        order: Sequence[sympy.Symbol],
        carry: Callable[[Component], sympy.Expr] | None = None,
    ) -> Component:
        """The component with this content, made if there is none yet."""
        full = (reduction, frozenset(reduced), *key)
        if full in self.components:
            return self.components[full]
        free = ranks_of(element) - set(reduced)
        # A rank that only the reference's state carries belongs to the element as well: ranks_of sees it in the access.
        indices = tuple([s for s in order if s in free] + sorted(free - set(order), key=lambda s: s.name))
        inner = tuple(s for s in reduced if s != self.rank)
        component = Component(self.fresh(hint), indices, reduction, inner, element, sympy.Integer(0))
        own = state(component, self.rank, OLD)
        component = replace(component, carry=carry(component) if carry else own)
        self.components[full] = component
        return component

    def plain(
        self,
        hint: str,
        reduction: str,
        reduced: tuple[sympy.Symbol, ...],
        element: sympy.Expr,
        order: Sequence[sympy.Symbol],
    ) -> Component:
        """A component that depends on no reference."""
        return self.add(hint, reduction, reduced, (sympy.expand(element),), element, order)

    def maximum(
        self, hint: str, reduced: tuple[sympy.Symbol, ...], a: sympy.Expr, order: Sequence[sympy.Symbol]
    ) -> Reference:
        """The running maximum of a, as a positive multiple of a known maximum (or negative one of a minimum)."""
        a = sympy.expand(a)
        for key, component in self.components.items():
            if key[0] not in ("max", "min") or key[1] != frozenset(reduced) or len(key) != 3:
                continue
            scale = sympy.cancel(a / key[2]) if key[2] != 0 else sympy.S.NaN
            if scale.is_number and scale.is_real and (scale.is_positive if key[0] == "max" else scale.is_negative):
                self.running.add(component.name)
                return Reference(component, scale)
        component = self.plain(f"{hint}_max", "max", reduced, a, order)
        self.running.add(component.name)
        return Reference(component)

    def mean(
        self,
        hint: str,
        reduced: tuple[sympy.Symbol, ...],
        a: sympy.Expr,
        weight: Term,
        exponent: Reference | None,
        order: Sequence[sympy.Symbol],
    ) -> tuple[Component, Component, Component]:
        """(weighted sum of a, sum of weights, running mean) with the positive weights of ``weight``."""
        a = sympy.expand(a)
        total = self.weighted(f"{hint}_sum", reduced, replace(weight, x=a * weight.x, affine=()), exponent, (), order)
        count = self.weighted(f"{hint}_count", reduced, replace(weight, affine=()), exponent, (), order)
        key = ("mean", total.name, count.name)
        if key not in self.components:
            quotient = state(total, self.rank, NEW) / state(count, self.rank, NEW)
            value = Where(Less(sympy.Abs(quotient), _INFINITY), quotient, sympy.Integer(0))
            component = Component(self.fresh(f"{hint}_mean"), total.indices, None, (), value, sympy.Integer(0))
            self.components[key] = component
            self.running |= {total.name, count.name, component.name}
        return total, count, self.components[key]

    def weighted(
        self,
        hint: str,
        reduced: tuple[sympy.Symbol, ...],
        term: Term,
        exponent: Reference | None,
        affine: Sequence[tuple[sympy.Expr, Reference, int]],
        order: Sequence[sympy.Symbol],
    ) -> Component:
        """``sum where(masks, x * exp(a - M) * prod (a_i - c_i)**q_i, 0)``, and how it moves to new references."""
        r = self.rank
        active = [(a, c, q) for a, c, q in affine if q]
        value = term.x
        if exponent is not None:
            assert term.exponent is not None
            value = value * sympy.exp(term.exponent[0] - _finite(exponent.at(r, NEW), exponent))
        for a, c, q in active:
            centre = c.at(r, NEW)
            value = value * (a - (_finite(centre, c) if c is exponent else centre)) ** q
        key = (
            "weighted",
            term.masks,
            sympy.expand(term.x),
            (sympy.expand(term.exponent[0]), exponent.component.name) if exponent and term.exponent else None,
            tuple((sympy.expand(a), c.component.name, c.scale, q) for a, c, q in active),
        )
        if exponent is None and not active:
            return self.plain(hint, "sum", reduced, masked(term.masks, term.x), order)

        def carry(own: Component) -> sympy.Expr:
            moved = sympy.Integer(0)
            for powers in cartesian(*(range(q + 1) for _, _, q in active)):
                lower = [(a, c, s) for (a, c, _), s in zip(active, powers, strict=True)]
                full = list(powers) == [q for _, _, q in active]
                part = own if full else self.weighted(hint, reduced, term, exponent, lower, order)
                factor = sympy.Integer(1)
                for (_, c, q), s in zip(active, powers, strict=True):
                    factor *= sympy.binomial(q, s) * (c.at(r, OLD) - c.at(r, NEW)) ** (q - s)
                if not full:
                    self.running.add(part.name)
                moved += factor * state(part, r, OLD)
            if exponent is None:
                return moved
            before, after = exponent.at(r, OLD), exponent.at(r, NEW)
            return Where(Equal(before, -_INFINITY), sympy.Integer(0), sympy.exp(before - after) * moved)

        # Lower powers first: the state's components are listed in an order in which each reads only earlier ones.
        for powers in cartesian(*(range(q + 1) for _, _, q in active)):
            if list(powers) != [q for _, _, q in active]:
                lower = [(a, c, s) for (a, c, _), s in zip(active, powers, strict=True)]
                self.weighted(hint, reduced, term, exponent, lower, order)
        component = self.add(hint, "sum", reduced, key, masked(term.masks, value), order, carry)
        self.running.add(component.name)
        return component


def _finite(value: sympy.Expr, reference: Reference) -> sympy.Expr:
    """A maximum that is -inf (nothing seen but -inf) counts as 0, so that exp(-inf - M) is 0 and not a NaN."""
    return Where(Equal(value, -_INFINITY), sympy.Integer(0), value)


@dataclass
class Realized:
    """One term in terms of last states: its value, and the facts and functions for the certificate."""

    value: sympy.Expr
    exponent: Reference | None = None
    means: list[tuple[Affine, Component]] = field(default_factory=list)
    basis: list[Component] = field(default_factory=list)


def realize(
    term: Term,
    registry: Registry,
    hint: str,
    reduced: tuple[sympy.Symbol, ...],
    order: Sequence[sympy.Symbol],
    inline: Callable[[sympy.Expr], sympy.Expr],
    alias: Callable[[Component], sympy.Expr],
) -> Realized:
    """Register what a term needs; return its value at the end of the fiber.

    ``inline`` rewrites an expression to last states and inputs; ``alias`` gives the tensor equal to a component's last
    state.
    """
    if term.simple:
        if term.x == 1 and not term.masks:
            return Realized(term.d * sympy.Mul(*(size(s.name) for s in reduced)))
        component = registry.plain(hint, "sum", reduced, masked(term.masks, term.x), order)
        return Realized(term.d * registry.last(component), basis=[component])
    exponent = None
    if term.exponent is not None:
        exponent = registry.maximum(hint, reduced, term.exponent[0], order)
    weight = _weight(term, registry, exponent)
    centres: list[tuple[Affine, Reference, sympy.Expr]] = []
    result = Realized(sympy.Integer(0), exponent)
    for item in term.affine:
        shift = _shared_exponent(item, term)
        if exponent is not None and shift is not None:
            centres.append(
                (
                    replace(item, x=item.x - shift, d=item.d + shift),
                    exponent,
                    item.d + shift + alias(exponent.component) * exponent.scale,
                )
            )
            continue
        total, count, mean = registry.mean(
            hint, reduced, item.x, _mean_weight(item, term, weight, registry, reduced), exponent, order
        )
        reference = Reference(mean)
        result.means.append((item, mean))
        distance = _distance(
            item,
            total,
            count,
            mean,
            registry,
            hint,
            reduced,
            _mean_weight(item, term, weight, registry, reduced),
            exponent,
            order,
            inline,
        )
        centres.append((item, reference, distance))
    value = sympy.Integer(0)
    for powers in cartesian(*(range(item.power, -1, -1) for item, _, _ in centres)):
        factor = sympy.Integer(1)
        for (item, _, distance), q in zip(centres, powers, strict=True):
            factor *= sympy.binomial(item.power, q) * distance ** (item.power - q)
        affine = [(item.x, reference, q) for (item, reference, _), q in zip(centres, powers, strict=True)]
        component = registry.weighted(hint, reduced, term, exponent, affine, order)
        result.basis.append(component)
        value += factor * registry.last(component)
    result.value = term.d * _restore_exponent(value, term, exponent, registry, inline, alias)
    return result


def _weight(term: Term, registry: Registry, exponent: Reference | None) -> Term:
    """The part of a term that is certainly positive: its masks, its exponential and its positive factors."""
    factors = [f for f in sympy.Mul.make_args(term.x) if interval(f, registry.leaf).positive]
    return replace(
        term, d=sympy.Integer(1), x=sympy.Mul(*factors), affine=(), exponent=term.exponent if exponent else None
    )


def _mean_weight(item: Affine, term: Term, weight: Term, registry: Registry, reduced: tuple[sympy.Symbol, ...]) -> Term:
    """Equal weights where the plain sum is known already (a mean that the cascade computes itself), else ``weight``."""
    uniform = replace(weight, x=sympy.Integer(1))
    if weight.exponent is None and weight.x != 1:
        key = ("sum", frozenset(reduced), sympy.expand(masked(uniform.masks, sympy.expand(item.x))))
        if key in registry.components:
            return uniform
    return weight


def _shared_exponent(item: Affine, term: Term) -> sympy.Expr | None:
    """The part of ``item.x`` beyond the exponent's a, if that does not vary along the fiber."""
    if term.exponent is None:
        return None
    difference = sympy.expand(item.x - term.exponent[0])
    varying = {symbol for e in (item.x, term.exponent[0]) for symbol in accesses(e)}
    if difference == 0 or (difference.is_number and not (difference.atoms() & varying)):
        return difference
    return None


def _distance(
    item: Affine,
    total: Component,
    count: Component,
    mean: Component,
    registry: Registry,
    hint: str,
    reduced: tuple[sympy.Symbol, ...],
    weight: Term,
    exponent: Reference | None,
    order: Sequence[sympy.Symbol],
    inline: Callable[[sympy.Expr], sympy.Expr],
) -> sympy.Expr:
    """``b + c`` at the end. If b is minus the mean of a, it is 0 but for c's rounding, which the sum of a - c tells."""
    sizes = sympy.Mul(*(size(s.name) for s in reduced))
    weights = sizes if weight.x == 1 and not weight.masks and exponent is None else registry.last(count)
    rest = sympy.expand(inline(item.d) + registry.last(total) / weights)
    centred = registry.weighted(hint, reduced, weight, exponent, [(item.x, Reference(mean), 1)], order)
    if not rest.has(registry.last(total)):
        correction = registry.last(centred) / registry.last(count)
        if weight.masks:
            correction = Where(Equal(registry.last(count), 0), sympy.Integer(0), correction)
        return rest - correction
    return item.d + registry.last(mean)


def _restore_exponent(
    value: sympy.Expr,
    term: Term,
    exponent: Reference | None,
    registry: Registry,
    inline: Callable[[sympy.Expr], sympy.Expr],
    alias: Callable[[Component], sympy.Expr],
) -> sympy.Expr:
    """Multiply by ``exp(M + b)``; where M cancels, keep the NaN that the original has for a fiber of -inf only."""
    if exponent is None or term.exponent is None:
        return value
    named = alias(exponent.component)
    b = term.exponent[1]
    direct = sympy.expand(exponent.scale * named + b)
    if not direct.has(named):
        return Where(Equal(exponent.scale * named, -_INFINITY), sympy.nan, sympy.exp(direct) * value)
    last = registry.last(exponent.component)
    inlined = sympy.expand(exponent.scale * last + inline(b))
    if not inlined.has(last):
        return Where(Equal(exponent.scale * named, -_INFINITY), sympy.nan, sympy.exp(inlined) * value)
    return sympy.exp(exponent.scale * named + b) * value


def depends_on_state(component: Component, names: frozenset[str]) -> bool:
    """Whether the component reads another component while the fiber is walked."""
    own = component.name
    return any(
        tensor_name(item) in names and tensor_name(item) != own
        for e in (component.element, component.carry)
        for item in accesses(e)
    )
