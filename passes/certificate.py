"""The proof that goes with a rewrite, in a form that others can check.

Symbols are tensor names without indices (``QK``, and ``QK_2`` for a second access with other indices), ``size_n`` for
``|n|``, and ``NAME_new`` for a reference after it has moved. All proofs are symbolic: a certificate exists only if

- ``f - sum_j g_j * h_j`` is identically 0 (for max and min: f is h of the largest g);
- ``u(x; c') = T(c, c') u(x; c)`` for the re-based functions u, so the state's merge is exact;
- T is a cocycle: ``T(c', c'') T(c, c') = T(c, c'')``, so the order of merging does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product as cartesian

import numpy as np
import sympy

from ..ir.cascade import (
    COMPARISONS,
    Equal,
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
    Maximum,
    Minimum,
    NotEqual,
    Relu,
    Sigmoid,
    Where,
    is_rank,
    is_size,
)
from ..ir.cascade_interpreter import evaluate_expression
from .separable_rank import Term, is_zero, masked

_RELATIONS = {
    Less: sympy.Lt,
    LessEqual: sympy.Le,
    Greater: sympy.Gt,
    GreaterEqual: sympy.Ge,
    Equal: sympy.Eq,
    NotEqual: sympy.Ne,
}


@dataclass(frozen=True)
class Certificate:
    """Why ``einsum`` may be computed in the same pass as the reductions it depends on.

    ``mode``: defer (the d-part is applied at the end), rebase (a state moved by T), exchange (two contractions
    swapped). ``summand`` is f itself; ``residual`` is f minus the sum of g*h, and is 0.
    """

    einsum: str
    rank: str
    depends_on: tuple[str, ...]
    mode: str
    summand: sympy.Expr
    g: tuple[sympy.Expr, ...]
    h: tuple[sympy.Expr, ...]
    transition: tuple[tuple[sympy.Expr, ...], ...] | None = None
    conditions: Mapping[str, bool] = field(default_factory=dict)

    @property
    def k(self) -> int:
        return len(self.g)

    def to_json(self) -> dict[str, object]:
        transition = self.transition
        return {
            "einsum": self.einsum,
            "rank": self.rank,
            "depends_on": list(self.depends_on),
            "mode": self.mode,
            "k": self.k,
            "g": [sympy_text(g) for g in self.g],
            "h": [sympy_text(h) for h in self.h],
            "T": None if transition is None else [[sympy_text(entry) for entry in row] for row in transition],
            "residual": "0",
            "conditions": dict(self.conditions),
        }


def sympy_text(e: sympy.Expr) -> str:
    """The expression in plain sympy text (Piecewise, Max, exp, ...)."""
    return str(to_sympy(e))


def to_sympy(e: sympy.Expr) -> sympy.Expr:
    """Our own function classes replaced by sympy's."""
    if e.is_Symbol and is_size(e):
        return sympy.Symbol(f"size_{e.name.strip('|')}", integer=True, positive=True)
    if not e.args:
        return e
    args = [to_sympy(argument) for argument in e.args]
    if isinstance(e, Where):
        condition = args[0]
        if not isinstance(condition, (sympy.logic.boolalg.Boolean, bool)):
            condition = sympy.Ne(condition, 0)
        return sympy.Piecewise((args[1], condition), (args[2], True))
    if type(e) in COMPARISONS.values():
        args = [sympy.Piecewise((1, a), (0, True)) if isinstance(a, sympy.logic.boolalg.Boolean) else a for a in args]
        return _RELATIONS[type(e)](*args)
    args = [sympy.Piecewise((1, a), (0, True)) if isinstance(a, sympy.logic.boolalg.Boolean) else a for a in args]
    if isinstance(e, Maximum):
        return sympy.Max(*args)
    if isinstance(e, Minimum):
        return sympy.Min(*args)
    if isinstance(e, Relu):
        return sympy.Max(0, args[0])
    if isinstance(e, Sigmoid):
        return 1 / (1 + sympy.exp(-args[0]))
    return e.func(*args)


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
        elif symbol.is_positive:
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
