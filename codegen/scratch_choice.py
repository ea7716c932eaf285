"""Which internal buffers of which regions move to the scratch arena: as many as possible without a higher peak.

An arena is held for the whole step, so it may only fill what lies between the values that live across regions and the
peak that the step has anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from ..cost_model.region_memory import RegionBuffer, RegionMemory
from .scratch import ScratchLayout, layout

#: Shares of the room below the peak that are tried, and the bytes below which an arena is not worth its code.
SHARES = (1.0, 0.75, 0.5, 0.25)
SMALLEST = 1 << 16

#: Peak of the step in bytes, with the named buffers of each region not counted.
PeakWithout = Callable[[Mapping[str, frozenset[str]]], int]


def choose_layouts(
    candidates: Mapping[str, Sequence[RegionBuffer]], peak_without: PeakWithout
) -> dict[str, ScratchLayout]:
    """A layout for each region (by identity) of ``candidates``; empty when an arena would raise the peak."""
    peak = peak_without({})
    rest = peak_without({identity: names(buffers) for identity, buffers in candidates.items()})
    for share in SHARES:
        limit = int((peak - rest) * share)
        if limit < SMALLEST:
            break
        layouts = {identity: layout(buffers, limit) for identity, buffers in candidates.items()}
        height = max((each.height for each in layouts.values()), default=0)
        moved = {identity: frozenset(each.offsets) for identity, each in layouts.items()}
        if height >= SMALLEST and peak_without(moved) + height <= peak:
            return {identity: each for identity, each in layouts.items() if each.offsets}
    return {}


def names(buffers: Sequence[RegionBuffer]) -> frozenset[str]:
    return frozenset(buffer.name for buffer in buffers)


def without(memory: RegionMemory, moved: frozenset[str]) -> RegionMemory:
    return msgspec.structs.replace(memory, buffers=tuple(item for item in memory.buffers if item.name not in moved))
