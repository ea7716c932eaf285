"""Proofs of rewrites: each function here makes a ``Certificate``, or raises ``NotSeparable`` if a proof fails.

A summand's residual must have the normal form 0. A re-based state must move as ``u(x; c') = T(c, c') u(x; c)``, and T
must be a cocycle, both identically. What is left are conditions on the numbers:

- *deferral* keeps the sums of g as they are. It is chosen only for terms whose parts the intervals prove to have one
  sign, or which are products that the original rounds as well: ``sum |g||h|`` is then within a constant of the
  original's own error;
- *re-basing* on a running maximum has ``|T| <= 1``. On a weighted mean T is not bounded, but the state's error is: it
  holds sums of ``w |a - c|``, and ``sum w |a - mean| <= 2 sum w |a + b|`` for any b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product as cartesian

import numpy as np
import sympy

from ..ir.cascade import COMPARISONS, Einsum, is_rank, is_size
from ..ir.cascade_interpreter import evaluate_expression
from ..ir.cascade_printer import print_expression
from .certificate import Certificate
from .normal_form import is_zero
from .rebase import Context, Realized, Reference
from .separable_rank import NotSeparable, Term, masked, separate
from .summand import Summand
from .tropical import FINISHED, Monotone


def certify_sum(
    einsum: Einsum,
    rank: sympy.Symbol,
    parts: Summand,
    terms: Sequence[Term],
    realized: Sequence[Realized],
    context: Context,
) -> Certificate:
    """The certificate of a sum whose terms were realized in that order."""
    pairs = separate(terms)
    if not is_zero(parts.f - sympy.Add(*(g * h for g, h in pairs))):
        raise NotSeparable(f"the residual of the separation did not reduce to 0: {print_expression(parts.f)}")
    bases = [_basis(term, item, parts, context) for term, item in zip(terms, realized, strict=True)]
    moving = [basis for basis in bases if basis.exponent or basis.centres]
    conditions = {"distributes": True}
    if not moving:
        conditions["no_cancellation"] = True
    else:
        if not all(prove_transition(basis) for basis in moving):
            raise NotSeparable("the transition of the re-based state is not a cocycle")
        conditions["cocycle"] = True
        bounded = not any(basis.centres for basis in moving)
        conditions["transition_bounded" if bounded else "error_bounded"] = True
        if any(basis.exponent for basis in moving):
            conditions["minus_infinity_guarded"] = True
    suggested = sampled_rank(parts.f, parts.variables.x, parts.variables.d)
    if suggested is not None:
        conditions["rank_minimal"] = suggested == len(pairs)
    return Certificate(
        einsum.output,
        rank.name,
        parts.depends_on,
        "rebase" if moving else "defer",
        parts.f,
        tuple(g for g, _ in pairs),
        tuple(h for _, h in pairs),
        transition_matrix(moving) if moving else None,
        conditions,
    )


def certify_extremum(einsum: Einsum, rank: sympy.Symbol, parts: Summand, split: Monotone) -> Certificate:
    """The certificate of a max or min: ``f = h(g)``, h monotone. h reads the largest (smallest) g as ``finished``."""
    if not is_zero(parts.f - split.rebuild.xreplace({FINISHED: split.u})):
        raise NotSeparable(f"the residual of the separation did not reduce to 0: {print_expression(parts.f)}")
    finished = sympy.Symbol("finished", real=True)
    return Certificate(
        einsum.output,
        rank.name,
        parts.depends_on,
        "defer",
        parts.f,
        (split.u,),
        (split.rebuild.xreplace({FINISHED: finished}),),
        None,
        {"monotone" if split.direction else "monotone_either_way": True},
    )


def _basis(term: Term, realized: Realized, parts: Summand, context: Context) -> Basis:
    """The term's re-based functions in symbols."""

    def symbol(reference: Reference) -> sympy.Expr:
        named = parts.symbolic(context.alias(reference.component))
        return reference.scale * (named if named.is_Symbol else sympy.Symbol(reference.component.name, real=True))

    exponent = None
    if realized.exponent is not None:
        assert term.exponent is not None
        exponent = (term.exponent[0], symbol(realized.exponent))
    centres = tuple((parts.symbolic(c.a), symbol(c.reference), c.power) for c in realized.centres)
    return Basis(term, exponent, centres)


@dataclass(frozen=True)
class Basis:
    """The re-based functions of one term: ``u_q = where(masks, x * exp(a - M) * prod (a_i - c_i)**q_i, 0)``."""

    term: Term
    exponent: tuple[sympy.Expr, sympy.Expr] | None
    centres: tuple[tuple[sympy.Expr, sympy.Expr, int], ...]

    @property
    def powers(self) -> list[tuple[int, ...]]:
        return list(cartesian(*(range(power, -1, -1) for _, _, power in self.centres)))

    def functions(self, move: Mapping[sympy.Expr, sympy.Expr]) -> list[sympy.Expr]:
        """u at the references renamed by ``move``."""
        found = []
        for powers in self.powers:
            value = self.term.x
            if self.exponent:
                value *= sympy.exp(self.exponent[0] - self.exponent[1].xreplace(move))
            for (a, c, _), q in zip(self.centres, powers, strict=True):
                value *= (a - c.xreplace(move)) ** q
            found.append(masked(self.term.masks, value))
        return found

    def transition(
        self, before: Mapping[sympy.Expr, sympy.Expr], after: Mapping[sympy.Expr, sympy.Expr]
    ) -> sympy.Matrix:
        rows = []
        for q in self.powers:
            row = []
            for s in self.powers:
                entry = sympy.Integer(1)
                if any(b > a for a, b in zip(q, s, strict=True)):
                    entry = sympy.Integer(0)
                else:
                    for (_, c, _), top, low in zip(self.centres, q, s, strict=True):
                        entry *= sympy.binomial(top, low) * (c.xreplace(before) - c.xreplace(after)) ** (top - low)
                    if self.exponent:
                        entry *= sympy.exp(self.exponent[1].xreplace(before) - self.exponent[1].xreplace(after))
                row.append(entry)
            rows.append(row)
        return sympy.Matrix(rows)

    @property
    def reference_symbols(self) -> list[sympy.Expr]:
        found: set[sympy.Symbol] = set()
        for e in [c for _, c, _ in self.centres] + ([self.exponent[1]] if self.exponent else []):
            found |= e.free_symbols
        return sorted(found, key=lambda s: s.name)


def prove_transition(basis: Basis) -> bool:
    """``u(c') = T(c, c') u(c)`` and the cocycle law, identically."""
    names = basis.reference_symbols
    first = {s: sympy.Symbol(f"{s.name}__1", real=True) for s in names}
    second = {s: sympy.Symbol(f"{s.name}__2", real=True) for s in names}
    old, new = basis.functions({}), basis.functions(first)
    step = basis.transition({}, first)
    moved = step * sympy.Matrix(old)
    if not all(is_zero(new[i] - moved[i]) for i in range(len(new))):
        return False
    onward, whole = basis.transition(first, second), basis.transition({}, second)
    difference = onward * step - whole
    return all(is_zero(entry) for entry in difference)


def transition_matrix(bases: Sequence[Basis]) -> tuple[tuple[sympy.Expr, ...], ...]:
    """The block-diagonal T of all terms, from the old references to those with the suffix ``_new``."""
    blocks = []
    for basis in bases:
        after = {s: sympy.Symbol(f"{_plain_name(s)}_new", real=True) for s in basis.reference_symbols}
        blocks.append(basis.transition({}, after))
    matrix = sympy.diag(*blocks)
    return tuple(tuple(matrix.row(i)) for i in range(matrix.rows))


def _plain_name(symbol: sympy.Symbol) -> str:
    return f"size_{symbol.name.strip('|')}" if is_size(symbol) else str(symbol.name)


def sampled_rank(
    f: sympy.Expr, x: frozenset[sympy.Symbol], d: frozenset[sympy.Symbol], count: int = 14, seed: int = 0
) -> int | None:
    """Numerical rank of ``F[a, b] = f(x_a, d_b)`` on random samples: it suggests k, and proves nothing.

    None if the samples have values that are not finite.
    """
    generator = np.random.default_rng(seed)
    compared = {s for node in f.atoms(*COMPARISONS.values()) for s in node.free_symbols}
    values: dict[sympy.Expr, np.ndarray] = {}
    for symbol in sorted(f.free_symbols, key=lambda s: s.name):
        shape = (count, 1) if symbol in x else (1, count) if symbol in d else (1, 1)
        if is_size(symbol) or is_rank(symbol) or symbol in compared:
            sample = generator.integers(1, 4, shape).astype(np.float64)
        elif symbol.is_nonnegative:
            sample = np.exp(generator.uniform(-1.5, 1.5, shape))
        else:
            sample = generator.uniform(-1.5, 1.5, shape)
        values[symbol] = sample
    with np.errstate(all="ignore"):
        matrix = np.broadcast_to(evaluate_expression(f, values, np.float64), (count, count))
    if not np.all(np.isfinite(matrix)):
        return None
    spectrum = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    return int(np.sum(spectrum > 1e-10 * max(spectrum[0], 1e-300)))
