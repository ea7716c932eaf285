"""Index arithmetic: one coordinate taken apart into the coordinates of factors, ``c -> (c // 64, c % 64)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from ...ir.cascade import is_rank
from ...ir.types import Size
from .sizes import in_cascade, product


class NotAffine(Exception):
    """A coordinate has no affine form."""


def join(index: Sequence[sympy.Expr], sizes: Sequence[Size]) -> sympy.Expr:
    """The coordinate of a dimension whose factors have these coordinates and sizes, outer first."""
    if len(index) == 1:  # most dimensions: sympy would take its time to multiply by 1 and add 0
        return index[0]
    total: sympy.Expr = sympy.Integer(0)
    for position, part in enumerate(index):
        total += part * in_cascade(product(sizes[position + 1 :]))
    return total


def split(
    coordinate: sympy.Expr, sizes: Sequence[Size], rank_sizes: Mapping[sympy.Symbol, Size]
) -> tuple[sympy.Expr, ...]:
    """The coordinates of the factors. Raises ``NotAffine`` unless each is affine in the ranks."""
    if len(sizes) == 1:
        return (coordinate,)
    if not sizes:
        return ()
    inner = product(sizes[1:])
    if not isinstance(inner, int):
        return _split_symbolic(coordinate, sizes, rank_sizes)
    terms = sympy.expand(coordinate).as_coefficients_dict()
    quotient: sympy.Expr = sympy.Integer(0)
    rest: sympy.Expr = sympy.Integer(0)
    low = high = 0
    for term, coefficient in terms.items():
        if not coefficient.is_Integer:
            raise NotAffine
        whole, remainder = divmod(int(coefficient), inner)
        if term.is_Symbol and is_rank(term):
            if remainder == 0:
                quotient += whole * term
                continue
            extent = rank_sizes[term]
            if not isinstance(extent, int):
                raise NotAffine
            rest += coefficient * term
            ends = (0, int(coefficient) * (extent - 1))
            low, high = low + min(ends), high + max(ends)
        elif term == 1:
            quotient += whole
            rest += remainder
            low, high = low + remainder, high + remainder
        else:
            raise NotAffine
    if low < 0 or high >= inner:
        raise NotAffine
    return (quotient, *split(rest, sizes[1:], rank_sizes))


def _split_symbolic(
    coordinate: sympy.Expr, sizes: Sequence[Size], rank_sizes: Mapping[sympy.Symbol, Size]
) -> tuple[sympy.Expr, ...]:
    """The case of a coordinate that ``join`` made of ranks of exactly these sizes."""
    ranks = [s for s in coordinate.free_symbols if is_rank(s)]
    for candidate in _orders(ranks, sizes, rank_sizes):
        if sympy.expand(join(candidate, sizes) - coordinate) == 0:
            return tuple(candidate)
    raise NotAffine


def _orders(
    ranks: Sequence[sympy.Symbol], sizes: Sequence[Size], rank_sizes: Mapping[sympy.Symbol, Size]
) -> list[list[sympy.Expr]]:
    from itertools import permutations

    if len(ranks) != len(sizes) or len(ranks) > 4:
        return []
    return [
        list(order)
        for order in permutations(ranks)
        if all(rank_sizes[r] == s for r, s in zip(order, sizes, strict=True))
    ]
