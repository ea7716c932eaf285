"""The bytes that buffers hold over time: pure data in, data out.

Positions count steps; a buffer is live at ``lower <= position < upper``. A step uses what it reads and writes while it
runs, so a buffer freed by step p is live at p and no longer at p + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from ..ir.plan import Buffer


@dataclass(frozen=True)
class LiveBytes:
    """Bytes live at each position of one tier, and the first position at which they are most."""

    tier: str
    bytes: tuple[int, ...]

    @property
    def peak(self) -> int:
        return max(self.bytes, default=0)

    @property
    def peak_position(self) -> int:
        return self.bytes.index(self.peak) if self.bytes else 0


def live_bytes(buffers: Iterable[Buffer], length: int, tier: str = "device") -> LiveBytes:
    """Bytes live at each of ``length`` positions in a tier, counting each buffer at its exact size."""
    change = [0] * (length + 1)
    for buffer in buffers:
        if buffer.tier == tier and buffer.lower < buffer.upper:
            change[min(buffer.lower, length)] += buffer.bytes
            change[min(buffer.upper, length)] -= buffer.bytes
    return LiveBytes(tier, tuple(accumulate(change[:length])))


def reserved_bytes(buffers: Iterable[Buffer], arena: Mapping[str, int], length: int, tier: str = "device") -> LiveBytes:
    """Bytes held at each position when placed buffers live in arenas: an arena is held in full from the first to the
    last of its buffers, unplaced buffers for their own lifetimes. This is what ``Plan.peak`` counts."""
    change = [0] * (length + 1)
    held: dict[str, tuple[int, int]] = {}
    for buffer in buffers:
        if buffer.tier != tier or buffer.lower >= buffer.upper:
            continue
        if buffer.offset is None:
            change[buffer.lower] += buffer.bytes
            change[buffer.upper] -= buffer.bytes
        else:
            lower, upper = held.get(buffer.arena_key, (buffer.lower, buffer.upper))
            held[buffer.arena_key] = (min(lower, buffer.lower), max(upper, buffer.upper))
    for key, (lower, upper) in held.items():
        change[lower] += arena.get(key, 0)
        change[upper] -= arena.get(key, 0)
    return LiveBytes(tier, tuple(accumulate(change[:length])))


def by_role(buffers: Iterable[Buffer], position: int, tier: str = "device") -> dict[str, int]:
    """Bytes live at a position, summed by role, largest first."""
    totals: dict[str, int] = {}
    for buffer in buffers:
        if buffer.tier == tier and buffer.lower <= position < buffer.upper:
            totals[buffer.role] = totals.get(buffer.role, 0) + buffer.bytes
    return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))
