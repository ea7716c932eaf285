"""The memory-mapping game of a plan: for each use of each buffer, is it served from the scratchpad?

After mallocMuZero (Wang et al., Optimizing Memory Mapping Using Deep Reinforcement Learning, 2023). Steps run in order.
A use is a step that reads or makes a buffer, and has one of three fates:

    copy      it is copied from device memory to the scratchpad while steps before it run
    no-copy   it is there: made there, or there since the use before
    drop      it is read from, or made in, device memory

What is written in the scratchpad and needed in device memory later (a later use is a copy or a drop, or the buffer
outlives its last use) is copied back after that. A step takes as long as the slower of its arithmetic and its traffic;
traffic of uses in the scratchpad goes at the scratchpad's rate.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from ...cost_model.devices import Device
from ...errors import OptionError
from ...ir.plan import Plan

Fate = Literal["copy", "no-copy", "drop"]
DROP: Fate = "drop"
STAYS: Fate = "no-copy"
#: For each buffer, the fate of each of its uses in order.
Choice = dict[int, tuple[Fate, ...]]


@dataclass(frozen=True)
class Turn:
    """One step: ``arithmetic`` and ``fixed`` seconds, and bytes that it moves of each buffer."""

    name: str
    arithmetic: float
    fixed: float
    traffic: dict[int, float]


@dataclass(frozen=True)
class Piece:
    """A buffer: ``uses`` are positions of steps, ``writes`` says which of them write it. ``made``: the first use makes
    it; ``stays``: it is needed in device memory after its last use."""

    id: int
    name: str
    bytes: int
    uses: tuple[int, ...]
    writes: tuple[bool, ...]
    made: bool
    stays: bool


@dataclass(frozen=True)
class Game:
    """``slow`` and ``fast``: bytes a second of device memory and scratchpad; ``copy``: of the engine between them, with
    its ``latency``; ``capacity`` and ``alignment`` are the scratchpad's."""

    turns: tuple[Turn, ...]
    pieces: tuple[Piece, ...]
    slow: float
    fast: float
    copy: float
    latency: float
    capacity: int
    alignment: int

    def seconds(self, turn: Turn, inside: frozenset[int] = frozenset()) -> float:
        """Of a step whose buffers ``inside`` are in the scratchpad."""
        moved = sum(size / (self.fast if b in inside else self.slow) for b, size in turn.traffic.items())
        return turn.fixed + max(turn.arithmetic, moved)

    def copy_seconds(self, size: int) -> float:
        return self.latency + size / self.copy

    @functools.cached_property
    def begins(self) -> list[float]:
        """When each step begins, and the last ends, with everything in device memory."""
        return [0.0, *itertools.accumulate(self.seconds(turn) for turn in self.turns)]

    def prefetch(self, piece: Piece, use: int) -> int:
        """The step during which the copy for a use begins: the last that leaves time for it."""
        begin = self.begins[piece.uses[use]] - self.copy_seconds(piece.bytes)
        return max(0, bisect.bisect_right(self.begins, begin) - 1)

    def saving(self, position: int, buffer: int) -> float:
        """Seconds of traffic that serving a buffer from the scratchpad takes from a step."""
        size = self.turns[position].traffic.get(buffer, 0.0)
        return size / self.slow - size / self.fast

    def room(self, piece: Piece) -> int:
        return -(-piece.bytes // self.alignment) * self.alignment


def game_of(plan: Plan, device: Device, capacity: int | None = None) -> Game:
    """The game of a plan's compute steps, on the scratchpad of a device. Raises OptionError where it has none."""
    tier = device.tiers.get("scratchpad")
    if tier is None:
        raise OptionError(f"device {device.name!r} has no scratchpad", remedy="add one to the tiers of its device file")
    slow = device.bandwidth * device.efficiency_of("memory")
    rate = device.matrix_rate(plan.dtype) * device.efficiency_of("gemm")
    buffers = {b.id: b for b in plan.buffers if b.tier == "device" and b.bytes > 0}
    steps = [step for step in plan.steps if step.kind not in ("swap_in", "swap_out", "free")]
    turns, made = [], set()
    uses: dict[int, list[tuple[int, bool]]] = defaultdict(list)
    for position, step in enumerate(steps):
        touched = [b for b in dict.fromkeys((*step.reads, *step.writes)) if b in buffers]
        total = sum(buffers[b].bytes for b in touched) or 1
        arithmetic = min(step.seconds, step.flop / rate)
        moved = min(step.bytes_moved, int(step.seconds * slow))
        traffic = {b: moved * buffers[b].bytes / total for b in touched}
        fixed = step.seconds - max(arithmetic, moved / slow)
        turns.append(Turn(step.name, arithmetic, max(0.0, fixed), traffic))
        for b in touched:
            if not uses[b] and b in step.writes and b not in step.reads:
                made.add(b)
            uses[b].append((position, b in step.writes))
    pieces = [
        Piece(
            b, buffers[b].name, buffers[b].bytes, tuple(p for p, _ in found), tuple(w for _, w in found), b in made,
            buffers[b].role in ("output", "gradient", "parameter", "optimizer", "buffer") or b not in made,
        )
        for b, found in uses.items()
    ]  # fmt: skip
    return Game(
        tuple(turns), tuple(pieces), slow, tier.bandwidth.value, slow, tier.latency.value,
        int(tier.capacity.value) if capacity is None else capacity, tier.alignment,
    )  # fmt: skip
