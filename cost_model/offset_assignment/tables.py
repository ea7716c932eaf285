"""A problem as arrays: what the compiled searches read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
#: Sections looked at for the padding that the topmost buffer does not need.
_PADDED_SECTIONS = 64
_N = TypeVar("_N", np.int64, np.float64)


@dataclass(frozen=True)
class Tables:
    """Buffers with half-open lifetimes ``lower <= t < upper``, sizes and alignments in bytes; no gaps.

    Sizes are multiples of what all alignments have in common; ``padding`` is the part of them added for it, which a
    buffer with nothing above it does not need. Searches want sizes above 0.

    A *section* is a maximal set of buffers live at one time; a buffer lies in the sections ``first_section`` to
    ``last_section``, both included.
    """

    lower: Ints
    upper: Ints
    size: Ints
    alignment: Ints
    padding: Ints

    def only(self, members: Ints) -> Tables:
        """The table of some of the buffers."""
        columns = (self.lower, self.upper, self.size, self.alignment, self.padding)
        return Tables(*(column[members] for column in columns))

    def height(self, offsets: Ints) -> int:
        """Largest end of a placement, in bytes, without padding."""
        return int((offsets + self.size - self.padding).max(initial=0))

    @cached_property
    def unit(self) -> int:
        """Heights worth looking at are multiples of it: those of placements in which every buffer rests on others."""
        common = int(np.gcd.reduce(self.size - self.padding)) if self.size.size else 1
        if common and not (common % self.alignment).any():
            return common
        return max(1, int(np.gcd.reduce(np.append(self.alignment, common))))

    @cached_property
    def bound(self) -> int:
        """Bytes that no placement can stay under: most bytes live at a time, all but the topmost buffer padded."""
        load = self.section_load
        bound = int(load.max(initial=0))
        if self.padding.any():
            bound = 0
            for section in np.argsort(-load, kind="stable")[:_PADDED_SECTIONS]:
                live = (self.first_section <= section) & (section <= self.last_section)
                bound = max(bound, int(load[section] - self.padding[live].max(initial=0)))
        return -(-bound // self.unit) * self.unit

    @cached_property
    def length(self) -> Ints:
        return self.upper - self.lower

    @cached_property
    def by_lower(self) -> Ints:
        return np.argsort(self.lower, kind="stable").astype(np.int64)

    @cached_property
    def _section_times(self) -> Ints:
        """One time inside each section: a start after which the next event is an end (Helly: cliques of intervals)."""
        starts = np.unique(self.lower)
        ends = np.unique(self.upper)
        next_end = ends[np.searchsorted(ends, starts, side="right")]
        next_start = np.append(starts[1:], np.iinfo(np.int64).max)
        return np.asarray(starts[next_end <= next_start], np.int64)

    @cached_property
    def sections(self) -> int:
        return int(self._section_times.size)

    @cached_property
    def first_section(self) -> Ints:
        return np.searchsorted(self._section_times, self.lower, side="left").astype(np.int64)

    @cached_property
    def last_section(self) -> Ints:
        return np.searchsorted(self._section_times, self.upper, side="left").astype(np.int64) - 1

    @cached_property
    def section_load(self) -> Ints:
        """Bytes live in each section."""
        change = np.zeros(self.sections + 1, np.int64)
        np.add.at(change, self.first_section, self.size)
        np.add.at(change, self.last_section + 1, -self.size)
        return np.cumsum(change)[:-1]

    def contention(self) -> Ints:
        """For each buffer the largest load of a section that it lies in."""
        return range_maximum(self.section_load, self.first_section, self.last_section)

    @cached_property
    def _neighbour_pair(self) -> tuple[Ints, Ints]:
        from .neighbour_lists import neighbour_lists  # loads the compiler, which small problems do not need

        return neighbour_lists(self.lower, self.upper, self.by_lower)

    @property
    def neighbours_start(self) -> Ints:
        return self._neighbour_pair[0]

    @property
    def neighbours(self) -> Ints:
        return self._neighbour_pair[1]


def range_maximum(values: NDArray[_N], first: Ints, last: Ints) -> NDArray[_N]:
    """Maximum of ``values[first..last]`` for each pair, by doubling (a sparse table)."""
    if values.size == 0:
        return np.zeros(first.size, values.dtype)
    levels = [values]
    while 2 ** len(levels) <= values.size:
        half = 2 ** (len(levels) - 1)
        levels.append(np.maximum(levels[-1][:-half], levels[-1][half:]))
    span = last - first + 1
    level = np.frexp(span.astype(np.float64))[1] - 1
    result = np.empty(first.size, values.dtype)
    for number, table in enumerate(levels):
        chosen = level == number
        result[chosen] = np.maximum(table[first[chosen]], table[last[chosen] - (1 << number) + 1])
    return result
