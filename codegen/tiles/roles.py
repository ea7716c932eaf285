"""What each rank of a kernel is: walked point by point, tiled, streamed or whole; and the sizes of its tiles.

The tile of a kernel is bounded by the second-level cache: scores, the operands that stream past and the accumulators
should stay in it. The sizes are the machine's (``Caches.of_this_machine``).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import sympy

from ...ir.cascade import accesses, ranks_of, tensor_name
from .launches import WHOLE, Kernel, Launches
from .operands import split_product

_SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")


class Machine(Protocol):
    """A processor that kernels are made for: how many blocks keep it busy, and how long tiles are."""

    @property
    def workers(self) -> int:
        """Blocks that it works on at once."""

    @property
    def readers(self) -> int:
        """Blocks that keep its memory busy, where a block has so few rows that it mostly reads."""

    @property
    def shortest(self) -> int:
        """Tiles are not made shorter than this to have twice as many blocks as workers."""

    @property
    def scans(self) -> bool:
        """Whether a kernel may look through what a mask is made from, to decide about a tile as a whole."""

    def lengths(self, kernel: Kernel, held: Sequence[int], depth: int, item_bytes: int) -> tuple[int, int]:
        """Tile lengths (rows, streamed). ``held``: elements that a row of each state has; ``depth``: of an operand."""


@dataclass(frozen=True)
class Caches:
    """Bytes of data cache of one core: first and second level. ``tile``: (rows, streamed) that were chosen otherwise;
    ``parts``: of the streamed rank, likewise."""

    first: int = 32 << 10
    second: int = 1 << 20
    tile: tuple[int, int] | None = None
    parts: int = 0

    @staticmethod
    @functools.cache
    def of_this_machine() -> Caches:
        """As the kernel reports them; the defaults where it does not."""
        found: dict[int, int] = {}
        for index in sorted(_SYSFS.glob("index*")) if _SYSFS.is_dir() else ():
            try:
                level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            except OSError:
                continue
            if kind in ("Data", "Unified") and size.endswith("K"):
                found[int(level)] = int(size[:-1]) << 10
        return Caches(found.get(1, Caches.first), found.get(2, Caches.second))

    @property
    def workers(self) -> int:
        return threads()

    @property
    def readers(self) -> int:
        return threads()

    @property
    def shortest(self) -> int:
        return 16 if self.tile is None else self.tile[0]

    @property
    def scans(self) -> bool:
        return True

    def lengths(self, kernel: Kernel, held: Sequence[int], depth: int, item_bytes: int) -> tuple[int, int]:
        """Scores, a packed and a plain operand and the state within the second-level cache."""
        if self.tile is not None:
            return self.tile
        room, most = self.second * 3 // 4 // item_bytes, max(held, default=1)
        for row in (128, 64, 32, 16):
            for column in (512, 256, 128, 64):
                if row * column + 2 * column * depth + row * (most + depth) <= room:
                    return row, column
        return 16, 64


@dataclass(frozen=True)
class Roles:
    """``steps``: rank -> tile length of every rank that a loop walks (1: point by point), outer loops first.

    Ranks in ``grid`` are independent; those in ``streamed`` are walked in order. All others are whole.
    """

    grid: tuple[sympy.Symbol, ...]
    streamed: tuple[sympy.Symbol, ...]
    steps: Mapping[sympy.Symbol, int]
    #: The outer one of two streamed ranks is walked by several workers, each with sums of its own.
    workers: bool = False

    @property
    def points(self) -> frozenset[sympy.Symbol]:
        return frozenset(s for s, step in self.steps.items() if step == 1)

    @property
    def ranges(self) -> frozenset[sympy.Symbol]:
        """Walked ranks of which a tile has a range."""
        return frozenset(s for s, step in self.steps.items() if step > 1)


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blocks_of(roles: Roles, sizes: Mapping[str, int]) -> int:
    """Tiles of the grid: what threads can share."""
    return math.prod(-(-sizes[s.name] // roles.steps[s]) for s in roles.grid)


def choose_roles(
    launches: Launches,
    kernel: Kernel,
    sizes: Mapping[str, int],
    units: Mapping[str, int | None],
    machine: Machine,
    item_bytes: int,
) -> Roles:
    """``units``: input -> the position of the dimension whose elements are neighbours."""
    if kernel.crossed:
        assert isinstance(machine, Caches)
        return crossed_roles(kernel, sizes, machine, item_bytes)
    kept = _kept(kernel)
    rows, columns, depth = _sides(launches, kernel)
    grid = _grid(kernel, kept, sizes)
    tiled = _tiled(kernel, grid, rows, columns, sizes, units, launches)
    nested = any(launches.flow.values[name].is_state for name in kernel.inner)
    recurrent = any(root.recurrence for root in kernel.roots)
    steps: dict[sympy.Symbol, int] = {s: 1 for s in grid}
    whole = [s for s in kept if s not in grid]
    held = [math.prod(sizes[s.name] for s in whole if s in root.indices) for root in kernel.roots]
    row, column = machine.lengths(kernel, held, depth or 64, item_bytes)
    for s in tiled:
        steps[s] = _step(row, sizes[s.name])
    _keep_busy(steps, tiled, sizes, machine)
    for s in kernel.streamed:
        last = s == kernel.streamed[-1]
        steps[s] = 1 if recurrent or (nested and last) or not last else _step(column, sizes[s.name])
    return Roles(tuple(grid), kernel.streamed, steps)


def crossed_roles(kernel: Kernel, sizes: Mapping[str, int], caches: Caches, item_bytes: int) -> Roles:
    """Tiles of both streamed ranks; four of them and two operands in the second-level cache."""
    grid = [s for s in _kept(kernel) if s in kernel.anchor and s not in kernel.streamed]
    room = caches.second * 3 // 4 // item_bytes
    row, column = caches.tile or next(
        ((r, c) for r, c in ((128, 256), (64, 256), (64, 128), (32, 64)) if 4 * r * c <= room), (16, 64)
    )
    steps = {s: 1 for s in grid}
    first, second = kernel.streamed
    steps[first], steps[second] = _step(row, sizes[first.name]), _step(column, sizes[second.name])
    return Roles(tuple(grid), kernel.streamed, steps, workers=not grid)


def _step(longest: int, size: int) -> int:
    """A tile length for a rank: a power of two, so that nearby sizes have the same kernel."""
    return min(longest, 1 << (size - 1).bit_length()) if size > 1 else 1


def _kept(kernel: Kernel) -> list[sympy.Symbol]:
    found: dict[sympy.Symbol, None] = {}
    for value in (*kernel.roots, *kernel.finals):
        found.update(dict.fromkeys(value.indices))
    return list(found)


def _grid(kernel: Kernel, kept: list[sympy.Symbol], sizes: Mapping[str, int]) -> list[sympy.Symbol]:
    """Kept ranks to walk: those of inner values, or of every result; and what is too long to be whole."""
    if not kernel.roots:
        return kept
    common = set(kernel.anchor)
    if not kernel.inner:
        shapes = [set(root.indices) for root in kernel.roots if root.indices]
        common = set.intersection(*shapes) if shapes else set()
    grid = [s for s in kept if s in common or sizes[s.name] > WHOLE]
    if not grid and kept:
        grid = [max(kept, key=lambda s: sizes[s.name])]
    return grid


def _sides(launches: Launches, kernel: Kernel) -> tuple[set[sympy.Symbol], set[sympy.Symbol], int]:
    """Row and column ranks of the kernel's matrix products, and the longest size that a whole rank has in them."""
    rows: set[sympy.Symbol] = set()
    columns: set[sympy.Symbol] = set()
    depth = 0
    for value in (*kernel.roots, *(launches.flow.values[name] for name in sorted(kernel.inner))):
        if value.reduction != "sum":
            continue
        streamed = frozenset(kernel.streamed) or frozenset(value.indices)
        order = tuple(s for s in value.indices if s not in kernel.streamed)
        order += tuple(s for s in value.indices if s in kernel.streamed)
        body = launches.inline(value.body, streamed)
        shared = frozenset(
            s for s in value.indices if all(s in ranks_of(factor) for factor in sympy.Mul.make_args(body))
        )
        split = split_product(body, order, value.reduced, shared)
        if split is not None:
            rows.update(split.rows)
            columns.update(split.columns)
            depth = max([depth, *(launches.sizes[s.name] for s in value.reduced if s not in kernel.streamed)])
    return rows, columns, depth


def _tiled(
    kernel: Kernel,
    grid: list[sympy.Symbol],
    rows: set[sympy.Symbol],
    columns: set[sympy.Symbol],
    sizes: Mapping[str, int],
    units: Mapping[str, int | None],
    launches: Launches,
) -> list[sympy.Symbol]:
    """Walked ranks of which a tile has a range: the longest on each side of the matrix products, else the rank whose
    elements are neighbours in most inputs, else the longest."""
    chosen: list[sympy.Symbol] = []
    for side in (rows, columns):
        found = [s for s in grid if s in side]
        if found:
            chosen.append(max(found, key=lambda s: sizes[s.name]))
    if chosen:
        return list(dict.fromkeys(chosen))
    votes: dict[sympy.Symbol, int] = {}
    for value in (*kernel.roots, *kernel.finals):
        for item in accesses(launches.inline(value.body, frozenset(kernel.streamed or value.indices))):
            unit = units.get(tensor_name(item))
            if unit is not None and item.args[unit] in grid:
                votes[item.args[unit]] = votes.get(item.args[unit], 0) + 1
    if votes:
        return [max(votes, key=lambda s: (votes[s], sizes[s.name]))]
    return [max(grid, key=lambda s: sizes[s.name])] if grid else []


def _keep_busy(
    steps: dict[sympy.Symbol, int], tiled: list[sympy.Symbol], sizes: Mapping[str, int], machine: Machine
) -> None:
    """Shorter tiles where there would be fewer than a few for each worker."""

    def blocks() -> int:
        return math.prod(-(-sizes[s.name] // step) for s, step in steps.items())

    while tiled and blocks() < 2 * machine.workers and max(steps[s] for s in tiled) > machine.shortest:
        longest = max(tiled, key=lambda s: steps[s])
        steps[longest] = max(machine.shortest, steps[longest] // 2)
