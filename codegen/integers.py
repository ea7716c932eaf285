"""Which integer operands a kernel must tell apart exactly: it computes in floating point, where large ones coincide."""

from __future__ import annotations

from collections.abc import Collection

import sympy

from ..ir.cascade import COMPARISONS, Cascade, accesses, tensor_name

#: Numbers below this are exact in float32.
_EXACT = 1 << 24


def compared_integers(cascade: Cascade, integers: Collection[str]) -> list[str]:
    """Of the inputs ``integers``, those that are compared with one another or with a large number. A comparison with a
    coordinate needs no care: a number too large for float32 is larger than any coordinate, rounded or not."""
    reached: dict[str, frozenset[str]] = {name: frozenset({name}) for name in integers}
    found: set[str] = set()
    for einsum in cascade.einsums:
        for node in einsum.body.atoms(*COMPARISONS.values()):
            here = _reached(node, reached)
            if len(here) > 1 or (here and any(abs(number) >= _EXACT for number in node.atoms(sympy.Integer))):
                found |= here
        reached[einsum.output] = _reached(einsum.body, reached) | reached.get(einsum.output, frozenset())
    return sorted(found)


def _reached(expression: sympy.Expr, reached: dict[str, frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*(reached.get(tensor_name(item), frozenset()) for item in accesses(expression)))
