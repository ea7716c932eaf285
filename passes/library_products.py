"""Sums of products as a library computes them: of two tensors that are there.

rewrite::

    Y[m,f] = sum[n] exp(S[m,n]) * V[n,f] * 2   ->   Y_left[m,n] = 2*exp(S[m,n])
                                                    Y[m,f]      = sum[n] Y_left[m,n] * V[n,f]
"""

from __future__ import annotations

from dataclasses import replace

import sympy
from sympy.core.function import AppliedUndef

from ..ir.cascade import Cascade, Einsum, access, ranks_of


def in_products(cascade: Cascade) -> Cascade:
    """The cascade with the factors of every matrix product as tensors of their own."""
    taken = set(cascade.tensors)
    result: list[Einsum] = []
    for einsum in cascade.einsums:
        sides = _sides(einsum)
        if sides is None:
            result.append(einsum)
            continue
        reads = []
        for word, side in zip(("left", "right"), sides, strict=True):
            if isinstance(side, AppliedUndef):
                reads.append(side)
                continue
            kept = tuple(symbol for symbol in (*einsum.kept, *einsum.reduced) if symbol in ranks_of(side))
            name = f"{einsum.output}_{word}"
            while name in taken:
                name += "_"
            taken.add(name)
            result.append(Einsum(name, kept, side, line=einsum.line))
            reads.append(access(name, kept))
        result.append(replace(einsum, body=reads[0] * reads[1]))
    return Cascade(tuple(result))


def product_operands(einsum: Einsum) -> tuple[AppliedUndef, AppliedUndef] | None:
    """The two tensors whose matrix product the Einsum is; None for any other Einsum."""
    sides = _sides(einsum)
    if sides is None or not all(isinstance(side, AppliedUndef) for side in sides):
        return None
    return sides


def _sides(einsum: Einsum) -> tuple[sympy.Expr, sympy.Expr] | None:
    """The factors, gathered into two that both lack some of the ranks."""
    if einsum.reduction != "sum" or not einsum.body.is_Mul:
        return None
    groups: dict[frozenset[sympy.Symbol], list[sympy.Expr]] = {}
    for factor in einsum.body.args:
        groups.setdefault(ranks_of(factor), []).append(factor)
    for own in sorted(groups, key=len):
        hosts = [other for other in groups if own < other]
        if hosts:
            groups[min(hosts, key=len)] += groups.pop(own)
    if len(groups) != 2 or any(len(own) == len(einsum.space) for own in groups):
        return None
    left, right = (sympy.Mul(*factors) for factors in groups.values())
    return left, right
