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

from ..ir.cascade import Equal, Less, Where, accesses, ranks_of, size
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
        self, hint: str, reduced: tuple[sympy.Symbol, ...], term: Term, order: Sequence[sympy.Symbol]
    ) -> Reference:
        """The running maximum of a term's exponent where its masks hold.

        A known maximum of which it is a positive multiple serves as well, or a minimum of which it is a negative one.
        """
        assert term.exponent is not None
        a = sympy.expand(term.exponent[0])
        for mask in reversed(term.masks):
            a = Where(mask, a, -_INFINITY)
        for key, component in self.components.items():
            if key[0] not in ("max", "min") or key[1] != frozenset(reduced) or len(key) != 3:
                continue
            scale = _multiple(a, key[2])
            if scale is not None and (scale > 0 if key[0] == "max" else scale < 0):
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
        count = self.weighted(f"{hint}_count", reduced, weight, exponent, (), order)
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
            return self.plain(f"{hint}_run", "sum", reduced, masked(term.masks, term.x), order)

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
        component = self.add(f"{hint}_run", "sum", reduced, key, masked(term.masks, value), order, carry)
        self.running.add(component.name)
        return component


def _multiple(a: sympy.Expr, b: object) -> sympy.Expr | None:
    """The rational number a / b, or None if it is none."""
    assert isinstance(b, sympy.Expr)
    first, second = a.as_coefficients_dict(), b.as_coefficients_dict()
    if set(first) != set(second) or not all(number.is_Rational and number != 0 for number in second.values()):
        return None
    ratios = {first[key] / second[key] for key in first}
    ratio = ratios.pop()
    return ratio if not ratios and ratio.is_Rational else None


def _finite(value: sympy.Expr, reference: Reference) -> sympy.Expr:
    """A maximum that is -inf (nothing seen but -inf) counts as 0, so that exp(-inf - M) is 0 and not a NaN."""
    return Where(Equal(value, -_INFINITY), sympy.Integer(0), value)


@dataclass(frozen=True)
class Context:
    """Where a term is realized: for which tensor (``hint``), over which ranks, in which order of kept ranks.

    ``inline`` rewrites an expression to last states and inputs; ``alias`` gives the tensor equal to a component's last
    state, or that state.
    """

    registry: Registry
    hint: str
    reduced: tuple[sympy.Symbol, ...]
    order: tuple[sympy.Symbol, ...]
    inline: Callable[[sympy.Expr], sympy.Expr]
    alias: Callable[[Component], sympy.Expr]


@dataclass(frozen=True)
class Centre:
    """The reference c of one factor ``(a + b)**power``; ``distance`` is ``b + c`` at the end of the fiber."""

    a: sympy.Expr
    power: int
    reference: Reference
    distance: sympy.Expr


@dataclass(frozen=True)
class Realized:
    """One term at the end of the fiber, and the references that its state is kept relative to."""

    value: sympy.Expr
    exponent: Reference | None = None
    centres: tuple[Centre, ...] = ()


def realize(term: Term, at: Context) -> Realized:
    """Register what a term needs; return its value at the end of the fiber."""
    registry = at.registry
    if term.simple:
        if term.x == 1 and not term.masks:
            return Realized(term.d * sympy.Mul(*(size(s.name) for s in at.reduced)))
        component = registry.plain(f"{at.hint}_run", "sum", at.reduced, masked(term.masks, term.x), at.order)
        return Realized(term.outer * _unless_masked(term.d * registry.last(component), term, at))
    exponent = None
    if term.exponent is not None:
        exponent = registry.maximum(at.hint, at.reduced, term, at.order)
    centres = tuple(_centre(item, term, exponent, at) for item in term.affine)
    value = sympy.Integer(0)
    for powers in cartesian(*(range(centre.power, -1, -1) for centre in centres)):
        factor = sympy.Integer(1)
        for centre, q in zip(centres, powers, strict=True):
            factor *= sympy.binomial(centre.power, q) * centre.distance ** (centre.power - q)
        affine = [(centre.a, centre.reference, q) for centre, q in zip(centres, powers, strict=True)]
        component = registry.weighted(at.hint, at.reduced, term, exponent, affine, at.order)
        value += factor * registry.last(component)
    whole = term.d * _restore_exponent(value, term, exponent, at)
    return Realized(term.outer * _unless_masked(whole, term, at), exponent, centres)


def _unless_masked(value: sympy.Expr, term: Term, at: Context) -> sympy.Expr:
    """0 for a fiber that is masked altogether, whatever d is there (often a NaN, or an infinity: 1/0)."""
    if not term.masks or not (term.exponent or term.affine or accesses(term.d)):
        return value
    ones = masked(term.masks, sympy.Integer(1))
    count = at.registry.plain(f"{at.hint}_unmasked", "sum", at.reduced, ones, at.order)
    return Where(Equal(at.registry.last(count), 0), sympy.Integer(0), value)


def _centre(item: Affine, term: Term, exponent: Reference | None, at: Context) -> Centre:
    shift = _shared_exponent(item, term)
    if exponent is not None and shift is not None:
        distance = item.d + shift + at.alias(exponent.component) * exponent.scale
        return Centre(item.x - shift, item.power, exponent, distance)
    weight = _mean_weight(item, term, exponent, at)
    total, count, mean = at.registry.mean(at.hint, at.reduced, item.x, weight, exponent, at.order)
    reference = Reference(mean)
    return Centre(item.x, item.power, reference, _distance(item, total, count, reference, weight, exponent, at))


def _mean_weight(item: Affine, term: Term, exponent: Reference | None, at: Context) -> Term:
    """The part of a term that is certainly positive: its masks, its exponential and its positive factors.

    Equal weights where the plain sum is known already (a mean that the cascade computes itself).
    """
    factors = [f for f in sympy.Mul.make_args(term.x) if interval(f, at.registry.leaf).positive]
    weight = replace(
        term, d=sympy.Integer(1), x=sympy.Mul(*factors), affine=(), exponent=term.exponent if exponent else None
    )
    if weight.exponent is None and weight.x != 1:
        uniform = replace(weight, x=sympy.Integer(1))
        key = ("sum", frozenset(at.reduced), sympy.expand(masked(uniform.masks, sympy.expand(item.x))))
        if key in at.registry.components:
            return uniform
    return weight


def _shared_exponent(item: Affine, term: Term) -> sympy.Expr | None:
    """The number by which ``item.x`` exceeds the exponent's a, if it is one: then M serves as the centre as well."""
    if term.exponent is None:
        return None
    difference = sympy.expand(item.x - term.exponent[0])
    return difference if difference.is_number else None


def _distance(
    item: Affine,
    total: Component,
    count: Component,
    mean: Reference,
    weight: Term,
    exponent: Reference | None,
    at: Context,
) -> sympy.Expr:
    """``b + c`` at the end. If b is minus the mean of a, it is 0 but for c's rounding, which the sum of a - c tells."""
    registry = at.registry
    sizes = sympy.Mul(*(size(s.name) for s in at.reduced))
    weights = sizes if weight.x == 1 and not weight.masks and exponent is None else registry.last(count)
    rest = sympy.expand(at.inline(item.d) + registry.last(total) / weights)
    if rest.has(registry.last(total)):
        return item.d + registry.last(mean.component)
    centred = registry.weighted(at.hint, at.reduced, weight, exponent, [(item.x, mean, 1)], at.order)
    return rest - registry.last(centred) / registry.last(count)


def _restore_exponent(value: sympy.Expr, term: Term, exponent: Reference | None, at: Context) -> sympy.Expr:
    """Multiply by ``exp(M + b)``; where M cancels, keep the NaN that the original has for a fiber of -inf only."""
    if exponent is None or term.exponent is None:
        return value
    named = exponent.scale * at.alias(exponent.component)
    last = exponent.scale * at.registry.last(exponent.component)
    b = term.exponent[1]
    for maximum, addend in ((named, b), (last, at.inline(b))):
        total = sympy.expand(maximum + addend)
        if not total.has(at.alias(exponent.component), at.registry.last(exponent.component)):
            return Where(Equal(named, -_INFINITY), sympy.nan, sympy.exp(total) * value)
    return sympy.exp(named + b) * value
