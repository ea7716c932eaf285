"""How the parts of a tile program are called in what is printed of it, and integer expressions over ranks and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy

from ...ir.cascade import is_rank, is_size


def size_name(rank: str) -> str:
    """The number of coordinates of a rank, or a named constant."""
    return f"z_{rank}"


def origin(rank: sympy.Symbol) -> str:
    """The first coordinate of a walked rank's tile (its only one, for a step of 1)."""
    return f"o_{rank.name}"


def inside(rank: sympy.Symbol) -> str:
    """The coordinate within the tile."""
    return f"i_{rank.name}"


def value(name: str) -> str:
    return f"v_{name}"


def tensor(name: str) -> str:
    return f"t_{name}"


def stride(name: str, position: int) -> str:
    return f"s_{name}_{position}"


def indented(lines: Iterable[str], spaces: int = 2) -> list[str]:
    return [f"{' ' * spaces}{line}" for line in lines]


def integer(e: sympy.Expr, coordinates: Mapping[sympy.Symbol, str]) -> str:
    """An affine expression of ranks, sizes and constants, as C++ and Python write it. ``coordinates`` maps ranks to
    text."""
    if e.is_Integer:
        return str(int(e))
    if e.is_Symbol:
        if is_size(e):
            return size_name(e.name.strip("|"))
        return coordinates[e] if is_rank(e) else size_name(e.name)
    if e.is_Add:
        return "(" + " + ".join(integer(part, coordinates) for part in e.args) + ")"
    if e.is_Mul:
        return "(" + " * ".join(integer(part, coordinates) for part in e.args) + ")"
    raise TypeError(f"no integer expression: {e}")
