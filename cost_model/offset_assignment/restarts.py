"""Exact search by restarts: many short searches in different orders, each learning from where the others failed.

A search that goes wrong early rarely recovers; a short one in another order often ends at once. The rank of a buffer
grows with the blame of the sections it lives in: how often they could not be packed (dom/wdeg; Boussemart et al., ECAI
2004). Two searches run at a time, in threads. Which of them counts does not depend on which is quicker.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .exact import NO_SOLUTION, SOLVED, STOPPED, search
from .tables import Ints, Tables, range_maximum

#: Criteria by which buffers are ranked, see ``_rank``; each is tried as it is, in this order, before chance comes in.
_KEYS = ("TLS", "TWA", "TSA", "WAT", "TAW", "SAT", "LST", "AST", "WTA", "STA")
#: Nodes of a search in an order without chance, and unit of the others' (times a term of Luby's sequence).
_FIRST_NODES, _NODES = 4000, 1000
_FADING = 0.7


@dataclass
class Restarts:
    """Searches of one problem; what is learned at one capacity serves the next."""

    tables: Tables
    seed: int
    #: Searches so far in orders drawn at random, and of each capacity those in the orders without chance.
    number: int = 0
    begun: dict[int, int] = field(default_factory=dict)
    blame: np.ndarray[tuple[int], np.dtype[np.float64]] = field(init=False)

    def __post_init__(self) -> None:
        self.blame = np.zeros(self.tables.sections, np.float64)

    def run(self, capacity: int, restarts: int, deadline: float) -> tuple[int, Ints]:
        """Search for a placement of at most ``capacity`` bytes with up to ``restarts`` more searches.

        Args:
            deadline: ``time.perf_counter()`` at which all is stopped.

        Returns:
            (SOLVED, offsets), (NO_SOLUTION, unused) where it is proven that there is none, or (STOPPED, unused).
        """
        none = np.zeros(0, np.int64)
        with ThreadPoolExecutor(2) as threads:
            for _ in range(0, restarts, 2):
                stops = [np.zeros(1, np.int64) for _ in range(2)]
                blames = [np.zeros(self.tables.sections, np.int64) for _ in range(2)]
                running = []
                for stop, blame in zip(stops, blames, strict=True):
                    rank, priority, nodes = self._next(capacity)
                    running.append(threads.submit(search, self.tables, rank, priority, capacity, nodes, stop, blame))
                for index, future in enumerate(running):
                    try:
                        status, offsets, _ = future.result(timeout=max(0.0, deadline - time.perf_counter()))
                    except TimeoutError:
                        status = STOPPED
                    if status != STOPPED or time.perf_counter() >= deadline:
                        for stop in stops[index:]:
                            stop[0] = 1
                        return (status, offsets) if status != STOPPED else (STOPPED, none)
                for blame in blames:
                    self.blame = self.blame * _FADING + blame / max(int(blame.sum()), 1)
        return STOPPED, none

    def _next(self, capacity: int) -> tuple[Ints, Ints, int]:
        """Rank of the buffers, priority of the sections and node limit of the next search."""
        sections = self.tables.sections
        lowest, alike = np.zeros(0, np.int64), np.ones(sections, np.int64)
        begun = self.begun.get(capacity, 0)
        if begun < 2 * len(_KEYS):
            self.begun[capacity] = begun + 1
            # Each order twice: by the valley with the fewest candidates, and by the lowest.
            priority = alike if begun % 2 == 0 else lowest
            return self._rank(_KEYS[begun // 2], 0.0, np.random.default_rng(0)), priority, _FIRST_NODES
        number = self.number
        self.number += 1
        generator = np.random.default_rng((self.seed, number))
        key = _KEYS[generator.integers(len(_KEYS))]
        if generator.random() < 0.7:
            key = str(generator.choice(["B", "M"])) + key.replace("T", "")
        rank = self._rank(key, float(generator.choice([0.03, 0.1, 0.3, 0.6])), generator)
        # Of valleys with as few candidates: any; or where it has failed most; or the nearest to some time.
        if number % 3 == 0:
            priority = alike
        elif number % 3 == 1:
            priority = (self.blame * (1.0 + 0.3 * generator.random(sections)) * (1 << 30)).astype(np.int64)
        else:
            priority = sections - np.abs(np.arange(sections, dtype=np.int64) - generator.integers(sections))
        return rank, priority, _NODES * luby(number + 1)

    def _rank(self, key: str, noise: float, generator: np.random.Generator) -> Ints:
        """Rank of each buffer when sorted by the criteria that the letters of ``key`` name, greatest first.

        T: largest load of a section that it lives in; B, M: largest and summed blame of its sections; A: area; W:
        number of sections; S: size; L: lifetime. ``noise`` blurs each criterion by up to that share.
        """
        tables = self.tables
        first, last = tables.first_section, tables.last_section
        summed = np.concatenate([np.zeros(1), np.cumsum(self.blame)])
        columns = []
        for letter in key:
            values: np.ndarray[tuple[int], np.dtype[np.float64]]
            if letter == "T":
                values = tables.contention().astype(np.float64)
            elif letter == "B":
                values = range_maximum(self.blame, first, last)
            elif letter == "M":
                values = summed[last + 1] - summed[first]
            elif letter == "A":
                values = tables.size.astype(np.float64) * tables.length
            elif letter == "W":
                values = (last - first + 1).astype(np.float64)
            else:
                values = (tables.size if letter == "S" else tables.length).astype(np.float64)
            columns.append(values * (1.0 + noise * generator.random(tables.size.size)))
        order = np.lexsort(columns[::-1])[::-1]
        rank = np.empty(order.size, np.int64)
        rank[order] = np.arange(order.size)
        return rank


def luby(index: int) -> int:
    """Term ``index`` (from 1) of 1, 1, 2, 1, 1, 2, 4, ... (Luby, Sinclair and Zuckerman, 1993)."""
    power = index.bit_length()
    if index == (1 << power) - 1:
        return 1 << (power - 1)
    return luby(index - (1 << (power - 1)) + 1)


__all__ = ["NO_SOLUTION", "SOLVED", "STOPPED", "Restarts", "luby"]
