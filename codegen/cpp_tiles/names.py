"""How the parts of a tile program are called in its C++, and integer expressions over ranks and sizes."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from ...ir.cascade import is_rank, is_size

#: Element type -> C++.
CPP_TYPES = {
    "f32": "float",
    "f64": "double",
    "bf16": "c10::BFloat16",
    "f16": "c10::Half",
    "i64": "int64_t",
    "i32": "int32_t",
    "i16": "int16_t",
    "i8": "int8_t",
    "u8": "uint8_t",
    "b1": "bool",
}


def size_name(rank: str) -> str:
    """The number of coordinates of a rank, or a named constant."""
    return f"z_{rank}"


def origin(rank: sympy.Symbol) -> str:
    """The first coordinate of a walked rank's tile (its only one, for a step of 1)."""
    return f"o_{rank.name}"


def count(rank: sympy.Symbol) -> str:
    """The number of coordinates in a walked rank's tile."""
    return f"c_{rank.name}"


def inside(rank: sympy.Symbol) -> str:
    """The coordinate within the tile."""
    return f"i_{rank.name}"


def pointer(value: str) -> str:
    return f"v_{value}"


def tensor(name: str) -> str:
    return f"t_{name}"


def stride(name: str, position: int) -> str:
    return f"s_{name}_{position}"


def integer(e: sympy.Expr, coordinates: Mapping[sympy.Symbol, str]) -> str:
    """An affine expression of ranks, sizes and constants as C++. ``coordinates`` maps ranks to text."""
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
