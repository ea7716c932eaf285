"""What is to be solved, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .tables import Ints, Tables

#: (begin, end, low, high): from begin to end of its life only bytes low..high of a buffer are in use (none if equal).
Gap = tuple[int, int, int, int]


@dataclass(frozen=True)
class Problem:
    """Buffers with half-open lifetimes ``lower <= t < upper``; sizes and alignments in bytes.

    ``gaps``: for each buffer its gaps in order of time, or nothing at all where no buffer has any. ``hint``: an offset
    that may be good, -1 where none is known.
    """

    lower: Ints
    upper: Ints
    size: Ints
    alignment: Ints
    gaps: Sequence[Sequence[Gap]] = ()
    hint: Ints | None = None

    def only(self, members: Ints) -> Problem:
        """The problem of some of the buffers."""
        hint = None if self.hint is None else self.hint[members]
        gaps = [self.gaps[b] for b in members] if self.gaps else ()
        return Problem(
            self.lower[members], self.upper[members], self.size[members], self.alignment[members], gaps, hint
        )

    @property
    def has_gaps(self) -> bool:
        return any(self.gaps)

    @cached_property
    def granule(self) -> int:
        """Every alignment, and so every offset, is a multiple of it."""
        return int(np.gcd.reduce(self.alignment)) if self.alignment.size else 1

    @cached_property
    def tables(self) -> Tables:
        """The arrays that searches read: sizes rounded up to the granule, gaps filled."""
        size = -(-self.size // self.granule) * self.granule
        columns = (self.lower, self.upper, size, self.alignment, size - self.size)
        return Tables(*(np.ascontiguousarray(column, np.int64) for column in columns))

    @cached_property
    def pieces(self) -> tuple[Tables, Ints, Ints]:
        """Each stretch of a life with the bytes in use then, as a table, with its buffer and its first byte."""
        rows: list[tuple[int, int, int, int, int]] = []
        for b, (lower, upper, size) in enumerate(zip(self.lower, self.upper, self.size, strict=True)):
            begin = int(lower)
            for gap_begin, gap_end, low, high in self.gaps[b] if self.gaps else ():
                if begin < gap_begin:
                    rows.append((begin, gap_begin, 0, int(size), b))
                if low < high and gap_begin < gap_end:
                    rows.append((gap_begin, gap_end, low, high, b))
                begin = gap_end
            if begin < upper:
                rows.append((begin, int(upper), 0, int(size), b))
        columns = np.array(rows, np.int64).reshape(-1, 5).T
        ones, zeros = (np.full(columns.shape[1], value, np.int64) for value in (1, 0))
        table = Tables(columns[0].copy(), columns[1].copy(), columns[3] - columns[2], ones, zeros)
        return table, columns[4].copy(), columns[2].copy()

    def lower_bound(self) -> int:
        """Bytes that no placement can stay under."""
        if self.has_gaps:
            return int(max(self.pieces[0].section_load.max(initial=0), self.size.max(initial=0)))
        return self.tables.bound

    def height(self, offsets: Ints) -> int:
        """Largest end of a placement, in bytes."""
        return int((offsets + self.size).max(initial=0))


@dataclass(frozen=True)
class Result:
    """Offsets in bytes, one a buffer, and the largest end; ``lower_bound`` holds for every placement.

    ``status``: ``optimal`` (no placement is lower), ``feasible``, ``infeasible`` (proof that the capacity is too small)
    or ``timeout`` (capacity not reached within the limits). The offsets are sound in every case.
    """

    offsets: Ints
    height: int
    lower_bound: int
    status: str
    solver: str

    @property
    def gap(self) -> float:
        """Distance of the height from the bound, as a share of the height."""
        return 0.0 if self.height <= 0 else max(0.0, (self.height - self.lower_bound) / self.height)
