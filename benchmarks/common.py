"""What all benchmarks share: the zoo, a training step, allocator peaks, and results kept with their versions."""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import models  # noqa: E402  (the zoo, tests/models.py)

_copies = itertools.count()


def compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """``torch.compile`` with code of its own. Dynamo keeps what it compiled by the function's code, a few of each, and
    eager runs beyond; and ``torch._dynamo.reset()`` would have what was made before compiled again, without the
    configuration that was set around its first call."""

    def call(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    code = call.__code__.replace(co_name=f"compiled_{next(_copies)}")
    return torch.compile(types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__), **settings)


def training_step(run: Callable[..., Any], sample: models.Sample) -> torch.Tensor:
    """Forward, cross-entropy and backward, gradients from zero. Returns the loss."""
    sample.model.zero_grad(set_to_none=True)
    loss = models.loss_of(run(**sample.inputs), sample.target)
    loss.backward()
    return loss.detach()


def allocator_peak(step: Callable[[], Any], model: torch.nn.Module) -> int:
    """Most bytes that ``step`` held above what was held before it, ``model`` having no gradients: the running sum of
    the profiler's memory events, which repeats exactly. (The profiler does not see the end of what began before.)"""
    model.zero_grad(set_to_none=True)
    gc.collect()  # what earlier models left in cycles would be freed inside the step
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda item: item.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def interleaved(
    steps: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2, settle: int = 0
) -> dict[str, list[float]]:
    """Seconds of each step in each round, one after the other so that drift of the machine meets all alike. ``settle``:
    calls before the one that is timed. The C library keeps the memory of the step before, so that one which needs more
    than its neighbour pays for fresh pages, and one which needs less does not."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for _ in range(settle):
                step()
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def median_ratio(mine: list[float], theirs: list[float]) -> float:
    """Median over rounds of the quotient within the round."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def environment() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": next(
            (line.split(":", 1)[1].strip() for line in cpu_information() if line.startswith("model name")),
            platform.machine(),
        ),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }


def cpu_information() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def keep(name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    return path


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("model", "backend") else "right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
