"""How the parts of a tile program are called in its C++."""

from __future__ import annotations

import sympy

from ..tiles.names import indented, inside, integer, origin, size_name, stride, tensor
from ..tiles.names import value as pointer

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


def count(rank: sympy.Symbol) -> str:
    """The number of coordinates in a walked rank's tile."""
    return f"c_{rank.name}"


__all__ = ["CPP_TYPES", "count", "indented", "inside", "integer", "origin", "pointer", "size_name", "stride", "tensor"]
