"""Preparing a component's sums for rewriting: products opened, conditions on a whole fiber moved out of its sum.

rewrite::

    P[m,n] = E[m,n] * DP[m,n]
    D[m]   = sum[n] P[m,n]                             ->  D[m] = sum[n] E[m,n] * DP[m,n]

    A[m,n] = where(C[m], E[m,n], 0)                        O_all[m,f] = sum[n] E[m,n] * V[n,f]
    O[m,f] = sum[n] A[m,n] * V[n,f]                    ->  O[m,f] = where(C[m], O_all[m,f], 0)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import Einsum, Where, access, ranks_of, tensor_name


def prepare(einsums: Sequence[Einsum], wide: Collection[str]) -> tuple[list[Einsum], dict[str, str]]:
    """The Einsums, and {new tensor: the tensor that it is a part of}."""
    table = {einsum.output: einsum for einsum in einsums}
    result: list[Einsum] = []
    parts: dict[str, str] = {}
    for einsum in einsums:
        if einsum.reduction != "sum":
            result.append(einsum)
            continue
        einsum = _open_product(einsum, table, wide)
        guard, body = _guarded(einsum, table, wide)
        if guard is None:
            result.append(einsum)
            continue
        inner = f"{einsum.output}_all"
        while inner in table or inner in parts:
            inner += "_"
        parts[inner] = einsum.output
        result.append(replace(einsum, output=inner, body=body))
        value = Where(guard, access(inner, einsum.indices), sympy.Integer(0))
        result.append(Einsum(einsum.output, einsum.indices, value, line=einsum.line))
    return result, parts


def _written_out(item: AppliedUndef, table: Mapping[str, Einsum], wide: Collection[str]) -> sympy.Expr | None:
    """What a wide map that is read here maps, in the reader's ranks."""
    source = table.get(tensor_name(item))
    if source is None or source.reduction or source.output not in wide:
        return None
    return source.body.xreplace(dict(zip(source.indices, item.args, strict=True)))


def _open_product(einsum: Einsum, table: Mapping[str, Einsum], wide: Collection[str]) -> Einsum:
    """A sum over a wide map that is a product, with the product in its place."""
    if len(einsum.reads) != 1 or einsum.body != einsum.reads[0]:
        return einsum
    body = _written_out(einsum.reads[0], table, wide)
    return replace(einsum, body=body) if body is not None and body.is_Mul else einsum


def _guarded(
    einsum: Einsum, table: Mapping[str, Einsum], wide: Collection[str]
) -> tuple[sympy.Expr | None, sympy.Expr]:
    """(condition that a factor of the summand has for whole fibers, the summand without it)."""
    reduced = frozenset(einsum.reduced)
    factors = list(sympy.Mul.make_args(einsum.body))
    for position, factor in enumerate(factors):
        found = _written_out(factor, table, wide) if isinstance(factor, AppliedUndef) else factor
        if isinstance(found, Where) and found.args[2] == 0 and not ranks_of(found.args[0]) & reduced:
            rest = sympy.Mul(*(other for at, other in enumerate(factors) if at != position))
            return found.args[0], found.args[1] * rest
    return None, einsum.body
