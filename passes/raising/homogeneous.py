"""How a cascade's tensors depend on a scalar that comes from outside: the gradient of a loss.

A tensor of degree 1 is the scalar times what it would be for 1. So gradients of degree 1 can be computed before the
scalar is known, in the forward, and be scaled in the backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import Einsum, Where, tensor_name

#: The expression is zero, and so of any degree.
ZERO = -1


def degrees(einsums: Iterable[Einsum], outside: Mapping[str, int | None]) -> dict[str, int | None]:
    """Tensor -> its degree in the scalar, 0 if it does not depend on it, None if it does in another way.

    ``outside`` gives the degrees of tensors that the Einsums do not write; 0 for those not listed. ``einsums`` are in
    an order in which each reads only what was written before."""
    found = dict(outside)
    for einsum in einsums:
        degree = _degree(einsum.body, found)
        if degree not in (0, ZERO) and einsum.reduction not in (None, "sum"):
            degree = None
        found[einsum.output] = 0 if degree == ZERO else degree
    return found


def _degree(e: sympy.Expr, known: Mapping[str, int | None]) -> int | None:
    if isinstance(e, AppliedUndef):
        return known.get(tensor_name(e), 0)
    if not e.args:
        return ZERO if e == 0 else 0
    parts = [_degree(argument, known) for argument in e.args]
    if all(part in (0, ZERO) for part in parts):
        return 0
    if None in parts:
        return None
    if e.is_Mul:
        return ZERO if ZERO in parts else sum(part for part in parts if part is not None)
    if e.is_Add:
        return _same(parts)
    if isinstance(e, Where) and parts[0] in (0, ZERO):
        return _same(parts[1:])
    if e.is_Pow and e.args[1].is_Integer and parts[0] is not None:
        return parts[0] * int(e.args[1])
    return None


def _same(parts: Iterable[int | None]) -> int | None:
    """The one degree of all parts that are not zero."""
    different = {part for part in parts if part != ZERO}
    return different.pop() if len(different) == 1 else None
