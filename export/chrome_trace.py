"""A plan's timeline, and a measured one beside it, in the trace event format of chrome://tracing and Perfetto."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..ir.plan import Plan
from ..summary import live_use

#: Trace event times are microseconds.
MICROSECONDS = 1e6
#: Process number of measured events: far from those of planned devices.
MEASURED = 1000


def chrome_trace(
    plan: Plan, measured: Iterable[Mapping[str, Any]] = (), memory: Sequence[float] = (), seconds: float = 0.0
) -> dict[str, Any]:
    """The trace as an object to be written as JSON.

    Each device is a process, each stream a thread of it, each step a complete event with its work and source line;
    memory in use is a counter. ``measured`` are trace events of a run (torch.profiler's), shown as their own process;
    ``memory`` the bytes held at equal distances over its ``seconds``.
    """
    events: list[dict[str, Any]] = []
    streams: dict[tuple[int, str], int] = {}
    for step in plan.steps:
        key = step.device, step.stream
        if key not in streams:
            streams[key] = len(streams)
            events += _named(step.device, f"{plan.device} {step.device} (planned)", streams[key], step.stream)
        if step.kind == "free":
            continue
        events.append(
            {
                "ph": "X",
                "pid": step.device,
                "tid": streams[key],
                "name": f"{step.kind} {step.name}",
                "cat": step.phase,
                "ts": step.start * MICROSECONDS,
                "dur": step.seconds * MICROSECONDS,
                "args": {
                    "step": step.id,
                    "module": step.module,
                    "source": step.source,
                    "flop": step.flop,
                    "bytes_moved": step.bytes_moved,
                    "region": step.region,
                    "ops": " ".join(step.ops),
                },
            }
        )
    for tier in sorted({buffer.tier for buffer in plan.buffers}):
        use = live_use(plan, tier)
        for step, size in zip(plan.steps, use, strict=False):
            events.append(_counter(0, f"{tier} memory", step.start * MICROSECONDS, {"live": size}))
    events += _measured(measured)
    for index, held in enumerate(memory):
        moment = seconds * index / max(len(memory) - 1, 1)
        events.append(_counter(MEASURED, "memory held by the allocator", moment * MICROSECONDS, {"held": int(held)}))
    if memory or any(event["pid"] == MEASURED for event in events):
        events.append({"ph": "M", "pid": MEASURED, "name": "process_name", "args": {"name": "measured"}})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"model": plan.model, "device": plan.device}}


def _named(process: int, name: str, thread: int, stream: str) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": stream}},
    ]


def _counter(process: int, name: str, moment: float, values: Mapping[str, int]) -> dict[str, Any]:
    return {"ph": "C", "pid": process, "name": name, "ts": moment, "args": dict(values)}


def _measured(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Complete events of another trace, its earliest at 0."""
    complete = [event for event in events if event.get("ph") == "X" and isinstance(event.get("ts"), int | float)]
    begin = min((event["ts"] for event in complete), default=0.0)
    threads: dict[object, int] = {}
    found = []
    for event in complete:
        thread = threads.setdefault((event.get("pid"), event.get("tid")), len(threads))
        found.append({**event, "pid": MEASURED, "tid": thread, "ts": event["ts"] - begin})
    return found
