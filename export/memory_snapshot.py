"""A plan's memory as a snapshot of PyTorch's allocator, for pytorch.org/memory_viz.

The format is that of ``torch.cuda.memory._dump_snapshot``: a pickled dict of ``segments`` (what is held at the end) and
``device_traces`` (each allocation and release in order). An arena is one segment, and its buffers are blocks at their
planned offsets; a buffer that is not placed is a segment of its own.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from typing import Any

from ..ir.plan import Buffer, Plan

#: Where addresses begin, and what separates segments: no segment is below address 0 or touches another.
BASE, GAP = 0x7F0000000000, 1 << 21
_LINE = re.compile(r'(?P<file>.*):(?P<line>\d+)(?: "(?P<text>.*)")?\Z')


def memory_snapshot(plan: Plan, tier: str = "device") -> dict[str, Any]:
    """The snapshot of one memory tier. Times are the begins of the steps, in microseconds."""
    buffers = [buffer for buffer in plan.buffers if buffer.tier == tier and buffer.upper > buffer.lower]
    addresses, arenas = _addresses(plan, buffers)
    trace: list[dict[str, Any]] = []
    last = max((buffer.upper for buffer in buffers), default=0)
    segments = [*((key, *place) for key, place in arenas.items())]
    for key, address, size in segments:
        trace.append(_entry("segment_alloc", address, size, 0, [_frame(f"arena {key}", "", 0)]))
    for position in range(last + 1):
        moment = _moment(plan, position)
        for buffer in buffers:
            if buffer.upper == position:
                for action in ("free_requested", "free_completed"):
                    trace.append(_entry(action, addresses[buffer.id], buffer.bytes, moment, _frames(buffer)))
        for buffer in buffers:
            if buffer.lower == position:
                trace.append(_entry("alloc", addresses[buffer.id], buffer.bytes, moment, _frames(buffer)))
    held = [buffer for buffer in buffers if buffer.lower < last <= buffer.upper]
    return {
        "segments": [_segment(key, address, size, held, addresses) for key, address, size in segments],
        "device_traces": [trace],
        "allocator_settings": {},
    }


def snapshot_bytes(plan: Plan, tier: str = "device") -> bytes:
    """The pickle that memory_viz reads. It holds numbers, texts, lists and dicts alone."""
    return pickle.dumps(memory_snapshot(plan, tier), protocol=4)


def _addresses(plan: Plan, buffers: Iterable[Buffer]) -> tuple[dict[int, int], dict[str, tuple[int, int]]]:
    """Address of each buffer; address and size of each segment."""
    arenas: dict[str, tuple[int, int]] = {}
    addresses: dict[int, int] = {}
    following = BASE
    for buffer in buffers:
        placed = buffer.offset is not None
        key = buffer.arena_key if placed else f"{buffer.name} ({buffer.id})"
        if key not in arenas:
            size = plan.arena.get(key, 0) if placed else buffer.bytes
            arenas[key] = following, max(size, 1)
            following += -(-max(size, 1) // GAP) * GAP + GAP
        addresses[buffer.id] = arenas[key][0] + (buffer.offset or 0)
    return addresses, arenas


def _moment(plan: Plan, position: int) -> int:
    if position < len(plan.steps):
        return int(plan.steps[position].start * 1e6)
    return int(plan.seconds * 1e6)


def _entry(action: str, address: int, size: int, moment: int, frames: list[dict[str, Any]]) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": moment, "frames": frames}


def _frames(buffer: Buffer) -> list[dict[str, Any]]:
    """Innermost first, as the allocator records them: the tensor, its source line, its module."""
    frames = [_frame(f"%{buffer.name} {buffer.role}", "", 0)]
    if match := _LINE.match(buffer.source):
        frames.append(_frame(match["text"] or "", match["file"], int(match["line"])))
    return [*frames, _frame(buffer.module, "", 0)] if buffer.module else frames


def _frame(name: str, file: str, line: int) -> dict[str, Any]:
    return {"name": name, "filename": file, "line": line}


def _segment(key: str, address: int, size: int, held: Iterable[Buffer], addresses: dict[int, int]) -> dict[str, Any]:
    """A segment with its blocks at the end of the plan, free stretches between them."""
    inside = sorted(
        (buffer for buffer in held if address <= addresses[buffer.id] < address + size and buffer.bytes),
        key=lambda buffer: addresses[buffer.id],
    )
    blocks: list[dict[str, Any]] = []
    end = address
    for buffer in inside:
        start = addresses[buffer.id]
        if start > end:
            blocks.append(_block(end, start - end, "inactive", []))
        blocks.append(_block(start, buffer.bytes, "active_allocated", _frames(buffer)))
        end = start + buffer.bytes
    if end < address + size:
        blocks.append(_block(end, address + size - end, "inactive", []))
    used = sum(buffer.bytes for buffer in inside)
    return {
        "device": 0,
        "address": address,
        "total_size": size,
        "allocated_size": used,
        "active_size": used,
        "requested_size": used,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [_frame(f"arena {key}", "", 0)],
        "blocks": blocks,
    }


def _block(address: int, size: int, state: str, frames: list[dict[str, Any]]) -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": size, "state": state, "frames": frames}
