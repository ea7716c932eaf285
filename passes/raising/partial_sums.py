"""Sums that would tie together what a kernel's grid keeps apart, cut into the kernel's part and a small rest.

The gradient of a temperature a head is summed over the batch too, that of a learned bias or a single weight over
everything. In a kernel whose other results keep batch and heads, such a sum is taken for each of them alone; what is
left is a sum over a small tensor, outside.

rewrite::

    DT[h] = sum[b,m,n] X[b,h,m,n]   ->   DT_part[b,h] = sum[m,n] X[b,h,m,n]
                                         DT[h]        = sum[b] DT_part[b,h]     (outside)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy

from ...ir.cascade import Einsum
from .components import Space

#: A partial result may have at most this many times the elements of the largest other result.
_LARGEST_PART = 0.25


@dataclass(frozen=True)
class Part:
    """``whole`` is ``part`` summed over its first ``count`` ranks."""

    part: str
    whole: str
    count: int
    indices: tuple[sympy.Symbol, ...]


def with_partial_sums(
    einsums: Sequence[Einsum], wanted: Sequence[str], space: Space
) -> tuple[list[Einsum], list[str], list[Part]]:
    """The Einsums and wanted tensors with such sums cut, and the sums that are left."""
    table = {einsum.output: einsum for einsum in einsums}
    grid = _grid([table[name] for name in wanted])
    parts: list[Part] = []
    result, names = list(einsums), list(wanted)
    while True:
        cut = _best(result, names, grid, space)
        if cut is None:
            return result, names, parts
        einsum, missing = cut
        part = f"{einsum.output}_part"
        indices = (*missing, *einsum.kept)
        rest = tuple(symbol for symbol in einsum.reduced if symbol not in missing)
        result[result.index(einsum)] = replace(einsum, output=part, indices=indices, reduced=rest)
        names[names.index(einsum.output)] = part
        parts.append(Part(part, einsum.output, len(missing), indices))
        grid = _grid([{e.output: e for e in result}[name] for name in names])


def _grid(einsums: Sequence[Einsum]) -> frozenset[sympy.Symbol]:
    return frozenset.intersection(*(frozenset(einsum.kept) for einsum in einsums))


def _best(
    einsums: Sequence[Einsum], wanted: Sequence[str], grid: frozenset[sympy.Symbol], space: Space
) -> tuple[Einsum, tuple[sympy.Symbol, ...]] | None:
    """A wanted sum without which the others keep more ranks, and those of them that it sums over."""
    table = {einsum.output: einsum for einsum in einsums}
    for name in wanted:
        einsum, others = table[name], [table[other] for other in wanted if other != name]
        read = any(item.func.__name__ == name for each in einsums for item in each.reads)
        if einsum.reduction != "sum" or not others or read:
            continue
        others = [other for other in others if not set(other.kept) < set(einsum.kept)] or others
        missing = tuple(symbol for symbol in einsum.reduced if all(symbol in other.kept for other in others))
        rest = [symbol for symbol in einsum.reduced if symbol not in missing]
        if not missing or not rest or set(missing) <= grid:
            continue
        largest = max(space.size(other.kept) for other in others)
        if space.size((*missing, *einsum.kept)) <= _LARGEST_PART * largest:
            return einsum, missing
    return None
