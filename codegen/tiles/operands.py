"""When a sum of products is a matrix product: splitting the summand's factors into a left and a right operand."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ...ir.cascade import ranks_of


@dataclass(frozen=True)
class Split:
    """``sum[reduced] left * right``; ``rows`` are the kept ranks of the left operand, ``columns`` of the right one."""

    left: sympy.Expr
    right: sympy.Expr
    rows: tuple[sympy.Symbol, ...]
    columns: tuple[sympy.Symbol, ...]


def split_product(
    summand: sympy.Expr,
    kept: tuple[sympy.Symbol, ...],
    reduced: tuple[sympy.Symbol, ...],
    points: frozenset[sympy.Symbol],
) -> Split | None:
    """The operands of a matrix product with the kept ranks in the order given, or None if the sum is none.

    ``points`` are ranks of which a tile has one coordinate. Both operands must depend on something that is reduced; the
    rows are the first of the kept ranks and the columns the rest. Factors that no kept rank is in go to the left.
    """
    free = [s for s in kept if s not in points]
    groups: list[tuple[set[sympy.Symbol], list[sympy.Expr]]] = []
    loose: list[sympy.Expr] = []
    for factor in sympy.Mul.make_args(summand):
        own = {s for s in free if s in ranks_of(factor)}
        if not own:
            loose.append(factor)
            continue
        joined = [group for group in groups if group[0] & own]
        merged = (set(own).union(*(g[0] for g in joined)), [f for g in joined for f in g[1]] + [factor])
        groups = [group for group in groups if group not in joined] + [merged]
    if len(groups) != 2:
        return None
    left, right = sorted(groups, key=lambda group: min(free.index(s) for s in group[0]))
    rows = tuple(s for s in free if s in left[0])
    columns = tuple(s for s in free if s in right[0])
    if (*rows, *columns) != tuple(free):
        return None
    walked = frozenset(reduced) - points
    operands = sympy.Mul(*left[1], *loose), sympy.Mul(*right[1])
    if not walked or any(not ranks_of(operand) & walked for operand in operands):
        return None
    if any(s not in ranks_of(operands[0]) | ranks_of(operands[1]) for s in walked):
        return None
    return Split(*operands, rows, columns)
