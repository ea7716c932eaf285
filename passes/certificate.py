"""The proof that goes with a rewrite, in a form that others can check.

Symbols are tensor names without indices (``QK``, and ``QK_2`` for a second access with other indices), ``size_n`` for
``|n|``, and ``NAME_new`` for a reference after it has moved. All proofs are symbolic: a certificate exists only if

- ``f - sum_j g_j * h_j`` is identically 0 (for max and min: f is h of the largest g);
- ``u(x; c') = T(c, c') u(x; c)`` for the re-based functions u, so the state's merge is exact;
- T is a cocycle: ``T(c', c'') T(c, c') = T(c, c'')``, so the order of merging does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom

from ..ir.cascade import (
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
    is_size,
)

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

    @property
    def summand_text(self) -> str:
        """f in plain sympy text."""
        return sympy_text(self.summand)

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
        condition = args[0] if _is_condition(args[0]) else sympy.Ne(args[0], 0)
        return sympy.Piecewise((args[1], condition), (args[2], True))
    args = [sympy.Piecewise((1, a), (0, True)) if _is_condition(a) else a for a in args]
    if type(e) in _RELATIONS:
        return _RELATIONS[type(e)](*args)
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
class Refusal:
    """Why ``einsum`` cannot be moved to an earlier pass over ``rank``."""

    einsum: str
    rank: str
    why: str

    def to_json(self) -> dict[str, str]:
        return {"einsum": self.einsum, "rank": self.rank, "why": self.why}


def _is_condition(e: sympy.Basic) -> bool:
    return isinstance(e, Relational | BooleanAtom)
