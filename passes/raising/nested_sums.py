"""A sum of sums as one sum: ``Y[k] = sum[g] sum[m] X`` -> ``Y[k] = sum[g,m] X``.

The gradient of keys that query heads share is summed over queries, then over heads; a bias that a batch shares, over
the batch, then over places.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import Einsum, Where, ranks_of, tensor_name


def merge_nested_sums(einsums: Sequence[Einsum], wanted: Collection[str]) -> list[Einsum]:
    """Sums that one sum alone reads are merged into it, where that is linear in them. Order is kept."""
    result = list(einsums)
    for inner in list(result):
        readers = [e for e in result if any(tensor_name(item) == inner.output for item in e.reads)]
        if inner.reduction != "sum" or inner.output in wanted or len(readers) != 1:
            continue
        merged = _merged(inner, readers[0])
        if merged is not None:
            result[result.index(readers[0])] = merged
            result.remove(inner)
    return result


def _merged(inner: Einsum, reader: Einsum) -> Einsum | None:
    items = [item for item in reader.reads if tensor_name(item) == inner.output]
    if reader.reduction != "sum" or len(items) != 1:
        return None
    item = items[0]
    if not set(item.args) <= reader.space or not set(reader.reduced) <= set(item.args):
        return None
    if not _linear(reader.body, item, frozenset(reader.reduced)) or set(inner.reduced) & reader.space:
        return None
    body = reader.body.xreplace({item: inner.body.xreplace(dict(zip(inner.indices, item.args, strict=True)))})
    return replace(reader, body=body, reduced=(*reader.reduced, *inner.reduced))


def _linear(e: sympy.Expr, item: AppliedUndef, reduced: frozenset[sympy.Symbol]) -> bool:
    """Whether the expression is ``item``, masked, times what does not vary along the sum.

    A factor that varies makes the two sums two matrix products, which are cheaper one after the other.
    """
    if e == item:
        return True
    if e.is_Mul:
        rest = [factor for factor in e.args if not factor.has(item)]
        if len(rest) != len(e.args) - 1 or any(ranks_of(factor) & reduced for factor in rest):
            return False
        return _linear(next(factor for factor in e.args if factor.has(item)), item, reduced)
    if isinstance(e, Where):
        condition, a, b = e.args
        return not condition.has(item) and b == 0 and _linear(a, item, reduced)
    return False
