"""Finite separable rank: writing a summand f(x, d) as a sum of products of x-only and d-only functions.

``decompose`` takes f apart by rules that are identities (distribution, exp(a+b) = exp(a)exp(b), log(ab) = log a + log b
for a > 0, ...). It keeps two kinds of mixed factors whole, since they are split in a numerically careful way later:

- one exponential ``exp(a(x) + b(d))``, of rank 1;
- powers of sums ``(a(x) + b(d))**p``, of rank p + 1.

``separate`` expands those too and finds the smallest k with ``f = sum_j g_j(x) * h_j(d)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product as cartesian

import sympy

from ..ir.cascade import COMPARISONS, Equal, NotEqual, Relu, Where
from ..ir.cascade_printer import print_expression
from .intervals import SAFE_EXPONENT, Interval, interval
from .normal_form import OPPOSITE, normal_form

#: More products than this, or a higher power, is no summand anyone streams.
_MAX_TERMS, _MAX_POWER = 48, 6


class NotSeparable(Exception):
    """The summand has no decomposition by the rules; the message says which part mixes what."""


@dataclass(frozen=True)
class Affine:
    """``(x + d) ** power``, with x varying along the fiber and d not."""

    x: sympy.Expr
    d: sympy.Expr
    power: int


@dataclass(frozen=True)
class Term:
    """``outer * where(masks, d * x * exp(exponent) * product of affine, 0)``; outer is a part of d."""

    d: sympy.Expr = sympy.S.One
    x: sympy.Expr = sympy.S.One
    masks: tuple[sympy.Expr, ...] = ()
    exponent: tuple[sympy.Expr, sympy.Expr] | None = None
    affine: tuple[Affine, ...] = ()
    outer: sympy.Expr = sympy.S.One

    @property
    def simple(self) -> bool:
        return self.exponent is None and not self.affine

    def map(self, change: Callable[[sympy.Expr], sympy.Expr]) -> Term:
        """The term with each of its expressions changed."""
        exponent = (change(self.exponent[0]), change(self.exponent[1])) if self.exponent else None
        affine = tuple(Affine(change(item.x), change(item.d), item.power) for item in self.affine)
        return Term(
            change(self.d), change(self.x), tuple(map(change, self.masks)), exponent, affine, change(self.outer)
        )


@dataclass(frozen=True)
class Variables:
    """Which symbols vary along the fiber (x), which depend on earlier reductions over it (d), and their bounds."""

    x: frozenset[sympy.Symbol]
    d: frozenset[sympy.Symbol]
    leaf: Callable[[sympy.Expr], Interval]

    def has_x(self, e: sympy.Expr) -> bool:
        return bool(e.free_symbols & self.x)

    def has_d(self, e: sympy.Expr) -> bool:
        return bool(e.free_symbols & self.d)

    def bound(self, e: sympy.Expr) -> Interval:
        return interval(e, self.leaf)

    def positive(self, e: sympy.Expr) -> bool:
        return self.bound(e).positive


def decompose(e: sympy.Expr, variables: Variables) -> list[Term]:
    """The terms of f. Raises ``NotSeparable``."""
    terms = _decompose(e, variables)
    return [_settle(term, variables) for term in terms if term.d != 0 and term.x != 0]


def _settle(term: Term, v: Variables) -> Term:
    """Split an exponential of which neither part can overflow or vanish; one without d is not split at all."""
    if term.exponent is not None:
        a, b = term.exponent
        if not v.has_d(b):
            return replace(term, x=term.x * sympy.exp(a + b), exponent=None)
        if _moderate(v.bound(a)) and _moderate(v.bound(b)):
            return replace(term, x=term.x * sympy.exp(a), d=term.d * sympy.exp(b), exponent=None)
    return term


def _moderate(bound: Interval) -> bool:
    return bound.low >= -SAFE_EXPONENT and bound.high <= SAFE_EXPONENT


def _decompose(e: sympy.Expr, v: Variables) -> list[Term]:
    if not v.has_d(e):
        return [_plain(e, v)]
    if not v.has_x(e):
        return [Term(d=e)]
    if e.is_Mul:
        return _product([_decompose(factor, v) for factor in e.args], e, v)
    if e.is_Add:
        return _sum(e, v)
    if e.is_Pow:
        return _power(e, v)
    if e.func is sympy.exp:
        return _exponential(e.args[0], v)
    if e.func is sympy.log:
        return _logarithm(e, v)
    if isinstance(e, Where):
        return _where(e, v)
    if e.func is sympy.Abs:
        term = _single(e.args[0], v, e)
        return [replace(term, d=sympy.Abs(term.d), x=sympy.Abs(term.x))]
    if isinstance(e, Relu):
        term = _single(e.args[0], v, e)
        if v.positive(term.d):
            return [replace(term, x=Relu(term.x))]
        if v.positive(term.x):
            return [replace(term, d=Relu(term.d))]
    raise _mixed(e, v)


def _plain(e: sympy.Expr, v: Variables) -> Term:
    """A part without d: what does not vary along the fiber is moved out."""
    inside: list[sympy.Expr] = []
    outside: list[sympy.Expr] = []
    for factor in sympy.Mul.make_args(e):
        (inside if v.has_x(factor) else outside).append(factor)
    return Term(d=sympy.Mul(*outside), x=sympy.Mul(*inside))


def _mixed(e: sympy.Expr, v: Variables) -> NotSeparable:
    xs = ", ".join(sorted(s.name for s in e.free_symbols & v.x))
    ds = ", ".join(sorted(s.name for s in e.free_symbols & v.d))
    kind = type(e).__name__.lower() if not e.is_Pow else f"power {e.args[1]}"
    return NotSeparable(f"{kind} of an expression that mixes {xs} with {ds} does not separate: {print_expression(e)}")


def _multiply(a: Term, b: Term) -> Term:
    exponent = a.exponent or b.exponent
    if a.exponent and b.exponent:
        exponent = (a.exponent[0] + b.exponent[0], a.exponent[1] + b.exponent[1])
    affine = list(a.affine)
    for item in b.affine:
        for position, known in enumerate(affine):
            if (known.x, known.d) == (item.x, item.d):
                affine[position] = replace(known, power=known.power + item.power)
                break
        else:
            affine.append(item)
    masks = tuple(dict.fromkeys((*a.masks, *b.masks)))
    d, outer = a.d * b.d, a.outer * b.outer
    if bool(a.masks) != bool(b.masks):
        # What multiplies a masked term from outside meets its zeros as well: 0 * NaN is NaN.
        d, outer = (a.d, outer * b.d) if a.masks else (b.d, outer * a.d)
    return Term(d, a.x * b.x, masks, exponent, tuple(affine), outer)


def _product(factors: Sequence[list[Term]], e: sympy.Expr, v: Variables) -> list[Term]:
    """All products of one term of each factor.

    A sum of several terms has an error relative to those terms, which the original has too (it rounds each of them). A
    product of two such sums has not, if they can cancel: the original rounds each sum before it multiplies.
    """
    sums = [terms for terms in factors if len(terms) > 1]
    if len(sums) > 1 and not all(_same_sign(terms, v) for terms in sums):
        raise NotSeparable(
            f"the terms may cancel in more than one factor, so expanding loses digits: {print_expression(e)}"
        )
    result = [Term()]
    for terms in factors:
        result = [_multiply(a, b) for a, b in cartesian(result, terms)]
        if len(result) > _MAX_TERMS:
            raise NotSeparable(f"more than {_MAX_TERMS} products: {print_expression(e)}")
    return result


def _same_sign(terms: Sequence[Term], v: Variables) -> bool:
    signs = set()
    for term in terms:
        bounds = (v.bound(term.x), v.bound(term.d * term.outer))
        if term.affine or not all(b.low >= 0 or b.high <= 0 for b in bounds):
            return False
        signs.add((bounds[0].low >= 0) == (bounds[1].low >= 0))
    return len(signs) <= 1


def _sum(e: sympy.Expr, v: Variables) -> list[Term]:
    xs, ds, neutral, mixed = [], [], [], []
    for part in e.args:
        if v.has_x(part) and v.has_d(part):
            mixed.append(part)
        elif v.has_x(part):
            xs.append(part)
        elif v.has_d(part):
            ds.append(part)
        else:
            neutral.append(part)
    if mixed:
        factored = _factored(e)
        if factored is not None:
            return _decompose(factored, v)
    if ds:
        ds.extend(neutral)
    else:
        xs.extend(neutral)
    x, d = sympy.Add(*xs), sympy.Add(*ds)
    terms: list[Term] = []
    if x != 0 and d != 0:
        bx, bd = v.bound(x), v.bound(d)
        if (bx.low >= 0 and bd.low >= 0) or (bx.high <= 0 and bd.high <= 0):
            terms += [_plain(x, v), Term(d=d)]
        else:
            terms.append(Term(affine=(Affine(x, d, 1),)))
    elif x != 0:
        terms.append(_plain(x, v))
    elif d != 0:
        terms.append(Term(d=d))
    for part in mixed:
        terms += _decompose(part, v)
    return terms


def _factored(e: sympy.Expr) -> sympy.Expr | None:
    """A sum as a product, such as x**2 - 2*x*d + d**2 -> (x - d)**2: terms that cancel must stay together."""
    if len(e.args) > 8 or len(e.free_symbols) > 10:
        return None
    opaque = {node: sympy.Dummy() for node in e.atoms(sympy.Function)}
    nodes = sorted(opaque, key=sympy.default_sort_key)
    outer = [n for n in nodes if not any(n != other and other.has(n) for other in nodes)]
    back = {opaque[node]: node for node in outer}
    hidden = e.xreplace({node: opaque[node] for node in outer})
    if not all(power.args[1].is_Integer for power in hidden.atoms(sympy.Pow)):
        return None
    result = sympy.factor(hidden)
    factors = [f for f in sympy.Mul.make_args(result) if not f.is_number]
    if len(factors) < 2 and not (factors and factors[0].is_Pow):
        return None
    return result.xreplace(back)


def _single(e: sympy.Expr, v: Variables, whole: sympy.Expr) -> Term:
    terms = _decompose(e, v)
    if len(terms) != 1 or terms[0].affine:
        raise _mixed(whole, v)
    return _inner(terms[0])


def _inner(term: Term) -> Term:
    return replace(term, d=term.d * term.outer, outer=sympy.Integer(1))


def _power(e: sympy.Expr, v: Variables) -> list[Term]:
    base, exponent = e.args
    if v.has_x(exponent) or v.has_d(exponent):
        if base.is_number and base.is_positive:
            return _exponential(exponent * sympy.log(base), v)
        raise _mixed(e, v)
    if exponent.is_Integer and 0 < exponent <= _MAX_POWER:
        return _product([_decompose(base, v)] * int(exponent), e, v)
    term = _single(base, v, e)
    if not exponent.is_Integer and not (v.positive(term.x) or v.positive(term.d)):
        raise NotSeparable(f"the sign of neither part is known under the power {exponent}: {print_expression(e)}")
    if term.masks:
        raise _mixed(e, v)
    scaled = (term.exponent[0] * exponent, term.exponent[1] * exponent) if term.exponent else None
    return [Term(term.d**exponent, term.x**exponent, (), scaled)]


def _exponential(argument: sympy.Expr, v: Variables) -> list[Term]:
    if isinstance(argument, Where):
        condition, a, b = argument.args
        return _decompose(Where(condition, sympy.exp(a), sympy.exp(b)), v)
    xs: list[sympy.Expr] = []
    ds: list[sympy.Expr] = []
    for part in sympy.Add.make_args(sympy.expand(argument)):
        if v.has_x(part) and v.has_d(part):
            raise _mixed(sympy.exp(argument), v)
        (xs if v.has_x(part) else ds).append(part)
    a, b = sympy.Add(*xs), sympy.Add(*ds)
    if a == 0:
        return [Term(d=sympy.exp(b))]
    return [Term(exponent=(a, b))]


def _logarithm(e: sympy.Expr, v: Variables) -> list[Term]:
    term = _single(e.args[0], v, e)
    if term.masks:
        raise _mixed(e, v)
    if not (v.positive(term.x) or v.positive(term.d)):
        raise NotSeparable(f"the sign of neither part is known under the logarithm: {print_expression(e)}")
    a, b = term.exponent or (sympy.Integer(0), sympy.Integer(0))
    return _decompose(sympy.log(term.x) + sympy.log(term.d) + a + b, v)


def _where(e: Where, v: Variables) -> list[Term]:
    condition, a, b = e.args
    if v.has_d(condition):
        raise _mixed(e, v)
    terms: list[Term] = []
    for branch, mask in ((a, condition), (b, complement(condition))):
        if branch != 0:
            for t in map(_inner, _decompose(branch, v)):
                terms.append(replace(t, masks=(mask, *(m for m in t.masks if m != mask))))
    return terms


def complement(condition: sympy.Expr) -> sympy.Expr:
    """The opposite condition. (A NaN makes a comparison and its plain opposite false, hence the equality with 0.)"""
    if type(condition) in (Equal, NotEqual):
        return OPPOSITE[type(condition)](*condition.args)
    exact = all(argument.is_integer and not argument.is_Float for argument in condition.args)
    if type(condition) in COMPARISONS.values() and exact:
        return OPPOSITE[type(condition)](*condition.args)
    return Equal(condition, sympy.Integer(0))


def masked(masks: Sequence[sympy.Expr], value: sympy.Expr) -> sympy.Expr:
    """``where(mask, value, 0)`` for each mask."""
    for mask in reversed(masks):
        value = Where(mask, value, sympy.Integer(0))
    return value


def products(terms: Sequence[Term]) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """The pairs (g, h) with f = sum of g*h, every mixed factor expanded."""
    pairs: dict[sympy.Expr, sympy.Expr] = {}
    for term in terms:
        a, b = term.exponent or (sympy.Integer(0), sympy.Integer(0))
        for powers in cartesian(*(range(item.power, -1, -1) for item in term.affine)):
            g, h = term.x * sympy.exp(a), term.outer * term.d * sympy.exp(b)
            for item, q in zip(term.affine, powers, strict=True):
                g *= item.x**q
                h *= sympy.binomial(item.power, q) * item.d ** (item.power - q)
            key = masked(term.masks, g)
            pairs[key] = pairs.get(key, sympy.Integer(0)) + h
    return [(g, h) for g, h in pairs.items() if h != 0]


def separate(terms: Sequence[Term]) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """``products`` with linearly dependent functions merged, so that their number is the rank k."""
    pairs = products(terms)
    while True:
        merged = _merge(pairs)
        merged = [(g, h) for h, g in _merge([(h, g) for g, h in merged])]
        if len(merged) == len(pairs):
            return merged
        pairs = merged


def _merge(pairs: list[tuple[sympy.Expr, sympy.Expr]]) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """Express each first member that depends linearly on earlier ones by those."""
    vectors = [_monomials(first) for first, _ in pairs]
    names = list(dict.fromkeys(name for vector in vectors for name in vector))
    if not names:
        return []
    matrix = sympy.Matrix([[vector.get(name, 0) for vector in vectors] for name in names])
    reduced, pivots = matrix.rref()
    result = [list(pairs[column]) for column in pivots]
    for column in range(len(pairs)):
        if column not in pivots:
            for row in range(len(pivots)):
                result[row][1] += reduced[row, column] * pairs[column][1]
    return [(first, second) for first, second in result]


def _monomials(e: sympy.Expr) -> dict[sympy.Expr, sympy.Rational]:
    return dict(normal_form(e).as_coefficients_dict())
