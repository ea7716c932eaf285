"""The way to the host and back: how long copies take, and when they run beside the ops of a step.

On a GPU copies have an engine of their own in each direction. A value leaves as soon as it is made and the engine is
free, and is in memory until its copy has ended. It comes back as late as possible: each copy begins so that it, and
those after it on the engine, end when their values are first read; where there is no such time the step waits. On a CPU
the process makes the copies itself, and nothing runs beside them.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ...cost_model.devices import Device


@dataclass(frozen=True)
class HostLink:
    """``out``, ``back``: bytes a second to and from the host; ``latency``: seconds that a copy takes besides;
    ``capacity``: bytes that the host offers. ``overlapped``: copies run beside the ops."""

    out: float
    back: float
    latency: float
    capacity: int
    overlapped: bool

    def out_seconds(self, size: int) -> float:
        return self.latency + size / self.out

    def back_seconds(self, size: int) -> float:
        return self.latency + size / self.back

    def both_seconds(self, size: int) -> float:
        """Seconds that a value's way takes from the step where nothing runs beside it: both copies on a CPU; on a GPU
        that back, which the backward waits for."""
        return self.back_seconds(size) + (0.0 if self.overlapped else self.out_seconds(size))


@dataclass(frozen=True)
class Copy:
    """``made``: the entry that writes the value; ``used``: that which first needs it back."""

    value: int
    bytes: int
    made: int
    used: int


@dataclass(frozen=True)
class Windows:
    """``released[v]``: the last entry at which v is in memory because its copy out runs; ``issued[v]``: the entry at
    whose beginning its copy back begins. ``stall``: seconds that the step waits for copies."""

    released: dict[int, int]
    issued: dict[int, int]
    stall: float


def host_link(device: Device) -> HostLink | None:
    """The link of a device to where it swaps to: files for the CPU, pinned memory for others. None: it has none."""
    tier = device.tiers.get("disk" if device.kind == "cpu" else "host")
    if tier is None:
        return None
    rate, overlapped = tier.bandwidth.value, device.kind != "cpu"
    return HostLink(rate, rate, tier.latency.value, int(tier.capacity.value), overlapped)


def copy_windows(seconds: Sequence[float], backward: int, copies: Sequence[Copy], link: HostLink) -> Windows:
    """When copies run beside entries that take ``seconds``, of which those from ``backward`` on are the backward."""
    if not link.overlapped:
        return Windows(
            {c.value: c.made for c in copies},
            {c.value: c.used for c in copies},
            sum(link.both_seconds(c.bytes) for c in copies),
        )
    begin = [0.0, *itertools.accumulate(seconds)]
    released: dict[int, int] = {}
    away: dict[int, float] = {}
    free = 0.0
    for copy in sorted(copies, key=lambda c: (c.made, c.value)):
        free = max(free, begin[copy.made + 1]) + link.out_seconds(copy.bytes)
        away[copy.value] = free
        released[copy.value] = min(max(copy.made, bisect.bisect_left(begin, free) - 1), len(seconds) - 1)
    back = sorted(copies, key=lambda c: (c.used, c.value))
    latest: dict[int, float] = {}
    end = begin[-1]
    for copy in reversed(back):
        end = min(begin[copy.used], end) - link.back_seconds(copy.bytes)
        latest[copy.value] = end
    issued: dict[int, int] = {}
    free, stall = begin[backward], 0.0
    for copy in back:
        start = max(latest[copy.value] + stall, free, away[copy.value])
        running = bisect.bisect_right(begin, start - stall) - 1
        issued[copy.value] = min(max(running, backward), copy.used)
        free = start + link.back_seconds(copy.bytes)
        stall += max(0.0, free - begin[copy.used] - stall)
    return Windows(released, issued, stall)
