"""The schedule that effcc chooses beside the default one: time and peak of training steps, without and with a limit.

    python benchmarks/schedule_choice.py [--models gpt2,llama] [--rounds 9] [--share 0.5] [--minutes 12]

Ten models take longer than ``--minutes``: no model is begun after that, and the next call goes on with those that are
left (``--again`` begins anew).

Default: kernels in the order of Inductor's heuristics, BLAS for products, no cascades. Chosen: everything left to
effcc. The limit lies ``--share`` of the way from the default schedule's peak with torch's smallest
``activation_memory_budget`` to its peak without one (above what is held before the step). Within it, the default
schedule fits by torch's own means: the largest such budget whose measured peak is within the limit. Time ratios are
medians over interleaved rounds of chosen over default.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import effcc
import torch
import torch._functorch.config as functorch_config
from common import (
    HERE,
    allocator_peak,
    compiled,
    environment,
    interleaved,
    keep,
    median_ratio,
    models,
    show,
    training_step,
)
from effcc import torch_internals

DEFAULT = {"cascades": False, "kernel_order": "inductor", "gemm": "blas"}
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


class Schedule:
    """A compiled training step; ``peak``: bytes above what was held before it."""

    def __init__(self, name: str, size: str, options: dict[str, Any], budget: float | None = None) -> None:
        effcc.reset_reports()
        torch.manual_seed(0)
        sample = models.build(name, size)
        run = compiled(sample.model, backend="effcc", options=options)
        self.step: Callable[[], Any] = lambda: training_step(run, sample)
        with functorch_config.patch(activation_memory_budget=1.0 if budget is None else budget):
            self.loss = float(self.step())
        self.held = sum(value.nbytes for value in (*sample.model.parameters(), *sample.model.buffers()))
        self.peak = allocator_peak(self.step, sample.model)
        report = effcc.reports()[-1]
        self.predicted = report.plan.seconds if report.plan is not None else float("nan")
        decisions = report.plan.decisions if report.plan is not None else ()
        self.gaps = [
            1 - each.bound / min(way.value for way in each.alternatives)
            for each in decisions
            if each.kind == "kernel order" and each.bound and min(way.value for way in each.alternatives) > 1 << 20
        ]


def within(name: str, size: str, limit: int, smallest: Schedule) -> Schedule | None:
    """The default schedule with the largest of torch's budgets that keeps the limit, found by halving: a smaller budget
    has no larger peak. ``smallest``: with none at all."""
    best = smallest if smallest.peak <= limit else None
    low, high = 0, len(BUDGETS)
    while best is not None and low < high:
        middle = (low + high) // 2
        made = Schedule(name, size, DEFAULT, BUDGETS[middle])
        if made.peak <= limit:
            best, high = made, middle
        else:
            low = middle + 1
    return best


def chosen_within(name: str, size: str, limit: int, held: int) -> Schedule | None:
    try:
        return Schedule(name, size, {"memory_budget": limit + held})
    except Exception as error:  # torch wraps what a backend raises
        cause = torch_internals.compile_error_cause(error)
        if not isinstance(cause, effcc.errors.BudgetError):
            raise
        print(f"{name}: {str(getattr(cause, 'message', cause)).splitlines()[0][:160]}", flush=True)
        return None


def known(name: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier call with these arguments and this torch."""
    path = HERE / "results" / f"{name}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    same = all(found["environment"].get(key) == about[key] for key in ("torch", "processor", "share", "rounds", "size"))
    return list(found["rows"]) if same else []


def compare(one: Schedule | None, other: Schedule | None, rounds: int) -> float | str:
    """Time of ``one`` over that of ``other``."""
    if one is None or other is None:
        return "only the chosen one fits" if one is not None else "only the default fits" if other else "none fits"
    seconds = interleaved({"chosen": one.step, "default": other.step}, rounds)
    return median_ratio(seconds["chosen"], seconds["default"])


def measure(name: str, size: str, rounds: int, share: float) -> dict[str, Any]:
    default, chosen = Schedule(name, size, DEFAULT), Schedule(name, size, {})
    smallest = Schedule(name, size, DEFAULT, 0.0)
    least = min(default.peak, smallest.peak)
    limit = int(least + share * (default.peak - least))
    row = {
        "model": name,
        "time ratio": compare(chosen, default, rounds),
        "default peak MB": default.peak / 1e6,
        "chosen peak MB": chosen.peak / 1e6,
        "predicted ratio": chosen.predicted / default.predicted,
        "order gap %": 100 * max(chosen.gaps, default=0.0),
        "loss difference": abs(default.loss - chosen.loss),
    }
    fitted, kept = within(name, size, limit, smallest), chosen_within(name, size, limit, default.held)
    row |= {
        "limit MB": limit / 1e6,
        "time ratio at limit": compare(kept, fitted, rounds),
        "default peak at limit MB": fitted.peak / 1e6 if fitted is not None else "",
        "chosen peak at limit MB": kept.peak / 1e6 if kept is not None else "",
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(models.ZOO))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--again", action="store_true", help="measure what was measured, too")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--size", default="bench")
    parser.add_argument("--name", default="schedule_choice")
    arguments = parser.parse_args()
    about = environment() | {"share": arguments.share, "rounds": arguments.rounds, "size": arguments.size}
    rows = [] if arguments.again else known(arguments.name, about)
    begin = time.monotonic()
    for name in arguments.models.split(","):
        if any(row["model"] == name for row in rows):
            continue
        if time.monotonic() - begin > 60 * arguments.minutes:
            print(f"{arguments.minutes:g} minutes are over: call it again for the models that are left", flush=True)
            break
        rows.append(measure(name, arguments.size, arguments.rounds, arguments.share))
        show("schedules", rows[-1:])
        keep(arguments.name, rows, about)
        gc.collect()
    show("schedules", rows)
    ratios = [row["time ratio"] for row in rows if isinstance(row["time ratio"], float)]
    at_limit = [row["time ratio at limit"] for row in rows]
    faster = sum(1 for each in at_limit if each == "only the chosen one fits" or (isinstance(each, float) and each < 1))
    about |= {"slowest ratio": max(ratios), "median ratio": statistics.median(ratios), "faster at limit": faster}
    print(keep(arguments.name, rows, about))


if __name__ == "__main__":
    main()
