"""What torch says about itself: traces, memory, compilations, graph breaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def structured_trace(name: str, text: Callable[[], str]) -> None:
    """Hand a text artifact to ``TORCH_TRACE`` / tlparse."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def debug_directory() -> Path:
    """The folder of this run that ``TORCH_COMPILE_DEBUG=1`` makes torch write to."""
    from torch._dynamo.utils import get_debug_dir

    return Path(get_debug_dir())


def memory_timeline(profile: Any) -> list[tuple[float, int]]:
    """(seconds since the first, bytes) of each allocation (positive) and release (negative), in order, from a finished
    ``torch.profiler.profile(profile_memory=True)``."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    begin = events[0].start_ns() if events else 0
    return [((event.start_ns() - begin) * 1e-9, event.nbytes()) for event in events]


def peak_growth(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """``run()``, and the most bytes that it held on the CPU above what was held before; None while a profiler is on."""
    result, growth, _ = peak_and_mark(run, "")
    return result, growth


def peak_and_mark(run: Callable[[], Any], prefix: str) -> tuple[Any, int | None, str]:
    """As ``peak_growth``, with the last ``torch.profiler.record_function`` before the peak whose name begins with
    ``prefix``, or ""."""
    from torch._C import _autograd, _profiler

    if not hasattr(_autograd, "_enable_profiler_legacy") or torch.autograd._profiler_enabled():
        return run(), None, ""
    # Unlike torch.profiler's Kineto it starts at once and says nothing.
    settings = _profiler.ProfilerConfig(
        _profiler.ProfilerState.CPU, False, True, False, False, False, _profiler._ExperimentalConfig()
    )
    _autograd._enable_profiler_legacy(settings)
    try:
        result = run()
    finally:
        records = _autograd._disable_profiler_legacy()
    highest, mark = 0, ""
    for thread in records:
        event: Any
        running, latest = 0, ""
        alive: Counter[int] = Counter()
        for event in thread:
            if event.kind() == "memory_alloc":
                size = event.cpu_memory_usage()
                # Torch's table of sizes outlives a record: what was there before and is freed now is reported where
                # its address is in the table, with the size of what had the address then. It is no gain.
                if size < 0 and not alive[-size]:
                    continue
                alive[abs(size)] += 1 if size > 0 else -1
                running += size
                if running > highest:
                    highest, mark = running, latest
            elif prefix and event.kind() == "push" and event.name().startswith(prefix):
                latest = event.name()
    return result, highest, mark


@dataclass(frozen=True)
class CompilationRecord:
    """One frame that Dynamo compiled: the function with its file and line, why it was compiled again ("" for the first
    time), and when, in microseconds."""

    where: str
    reason: str
    at: int = 0


def compilations() -> list[CompilationRecord]:
    """What Dynamo has compiled in this process, as far as it remembers, oldest first."""
    from torch._dynamo.utils import get_compilation_metrics

    return [
        CompilationRecord(
            f"{each.co_name} at {each.co_filename}:{each.co_firstlineno}",
            each.recompile_reason or "",
            each.start_time_us or 0,
        )
        for each in get_compilation_metrics()
        if each.co_name
    ]


def is_recompilation() -> bool:
    """Whether the frame that is being compiled was compiled before."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return current is not None and bool(current.frame_compile_id)


def graph_breaks() -> dict[str, int]:
    """Reasons of graph breaks so far, with their number."""
    from torch._dynamo.utils import counters

    return dict(counters["graph_break"])
