"""The schedule that effcc chooses beside the default one: time and peak of training steps, without and with a limit.

    python benchmarks/schedule_choice.py [--models gpt2,llama] [--rounds 7] [--share 0.5] [--minutes 12]

Ten models take longer than ``--minutes``: no model is begun after that, and the next call goes on with those that are
left (``--again`` begins anew).

A step is the forward with its loss, both compiled, and the backward; it hands out the loss alone. So nobody holds
logits, and a budget allows for nobody who does: both schedules have the same to hold.

Default: kernels in the order of Inductor's heuristics, BLAS for products, no cascades. Chosen: everything left to
effcc. With less memory the default schedule makes do by torch's own means: an ``activation_memory_budget`` of 0.75,
0.5, 0.25 or 0, of which the measured peaks are those that it can reach. (A smaller budget may have the larger peak.)
The limit lies ``--share`` of the way from the least of them up to the peak without a budget, counted above what is held
before the step. All that keep it are timed, and the fastest stands for the default schedule. Where no budget lowers its
peak by 2 % at least, the limit is 0.9 of that peak, which only the chosen schedule may keep; such models are counted by
themselves (``only the chosen one fits``).

Time ratios are medians over interleaved rounds of chosen over default; each timed step follows one of its own kind.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import effcc
import torch
import torch._functorch.config as functorch_config
from common import HERE, allocator_peak, compiled, environment, interleaved, keep, median_ratio, models, show
from effcc import torch_internals

DEFAULT = {"cascades": False, "kernel_order": "inductor", "gemm": "blas"}
BUDGETS = (0.75, 0.5, 0.25, 0.0)
#: A peak that torch's budgets lower by less than this share is one that they cannot lower.
LOWERED = 0.02
#: The limit where they cannot, as a share of the default schedule's peak.
BELOW = 0.9


class Schedule:
    """A compiled training step; ``peak``: bytes above what was held before it, which is ``held``."""

    def __init__(self, name: str, size: str, options: dict[str, Any], budget: float | None = None) -> None:
        effcc.reset_reports()
        sample = models.build(name, size)
        self.model, self.inputs, self.target = sample.model, sample.inputs, sample.target
        self.run = compiled(self.forward, backend="effcc", options=options)
        with functorch_config.patch(activation_memory_budget=1.0 if budget is None else budget):
            self.loss = float(self.step())
        given = (*self.model.parameters(), *self.model.buffers(), *self.inputs.values(), self.target)
        self.held = sum(value.nbytes for value in given)
        self.peak = allocator_peak(self.step, self.model)
        report = effcc.reports()[-1]
        self.predicted = report.plan.seconds if report.plan is not None else float("nan")
        decisions = report.plan.decisions if report.plan is not None else ()
        self.gaps = [
            1 - each.bound / min(way.value for way in each.alternatives)
            for each in decisions
            if each.kind == "kernel order" and each.bound and min(way.value for way in each.alternatives) > 1 << 20
        ]

    def forward(self, target: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return models.loss_of(self.model(**inputs), target)

    def step(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = self.run(self.target, self.inputs)
        loss.backward()
        return loss.detach()


def chosen_within(name: str, size: str, limit: int, held: int) -> Schedule | None:
    """None, with a line that says why, where effcc refuses the limit or does not keep it."""
    try:
        made = Schedule(name, size, {"memory_budget": limit + held})
    except Exception as error:  # torch wraps what a backend raises
        cause = torch_internals.compile_error_cause(error)
        if not isinstance(cause, effcc.errors.BudgetError):
            raise
        print(f"{name}: {str(getattr(cause, 'message', cause)).splitlines()[0][:160]}", flush=True)
        return None
    if made.peak > limit:
        print(f"{name}: WRONG: {made.peak} bytes at the peak, more than the limit of {limit}", flush=True)
        return None
    return made


def known(name: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier call with these arguments and this torch."""
    path = HERE / "results" / f"{name}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    asked = ("torch", "processor", "threads", "share", "rounds", "size", "budgets")
    same = all(found["environment"].get(key) == about[key] for key in asked)
    return list(found["rows"]) if same else []


def compare(chosen: Schedule | None, others: dict[str, Schedule], rounds: int) -> tuple[float | str, str]:
    """Time of the chosen schedule over that of the fastest of the others, and the fastest one's name."""
    if chosen is None:
        return ("only the default fits" if others else "none fits"), ""
    if not others:
        return "only the chosen one fits", ""
    steps = {"chosen": chosen.step, **{name: each.step for name, each in others.items()}}
    seconds = interleaved(steps, rounds, settle=1)
    fastest = min(others, key=lambda each: statistics.median(seconds[each]))
    return median_ratio(seconds["chosen"], seconds[fastest]), fastest


def measure(name: str, size: str, rounds: int, share: float) -> dict[str, Any]:
    default, chosen = Schedule(name, size, DEFAULT), Schedule(name, size, {})
    ratio, _ = compare(chosen, {"default": default}, rounds)
    row = {
        "model": name,
        "time ratio": ratio,
        "default peak MB": default.peak / 1e6,
        "chosen peak MB": chosen.peak / 1e6,
        "predicted ratio": chosen.predicted / default.predicted,
        "order gap %": 100 * max(chosen.gaps, default=0.0),
        "loss difference": abs(default.loss - chosen.loss),
    }
    del chosen
    smaller = {f"budget {budget:g}": Schedule(name, size, DEFAULT, budget) for budget in BUDGETS}
    least = min(each.peak for each in smaller.values())
    lowered = least < (1 - LOWERED) * default.peak
    limit = int(least + share * (default.peak - least) if lowered else BELOW * default.peak)
    fitting = {key: each for key, each in smaller.items() if each.peak <= limit}
    kept = chosen_within(name, size, limit, default.held)
    at_limit, fastest = compare(kept, fitting, rounds)
    return row | {
        "limit MB": limit / 1e6,
        "least default peak MB": least / 1e6,
        "time ratio at limit": at_limit,
        "default at limit": fastest or next(iter(fitting), ""),
        "default peak at limit MB": fitting[fastest].peak / 1e6 if fastest else "",
        "chosen peak at limit MB": kept.peak / 1e6 if kept is not None else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(models.ZOO))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--again", action="store_true", help="measure what was measured, too")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--size", default="bench")
    parser.add_argument("--name", default="schedule_choice")
    arguments = parser.parse_args()
    asked = {key: getattr(arguments, key) for key in ("share", "rounds", "size")}
    about = environment() | asked | {"budgets": list(BUDGETS)}
    rows = [] if arguments.again else known(arguments.name, about)
    begin = time.monotonic()
    for name in arguments.models.split(","):
        if any(row["model"] == name for row in rows):
            continue
        if time.monotonic() - begin > 60 * arguments.minutes:
            print(f"{arguments.minutes:g} minutes are over: call it again for the models that are left", flush=True)
            break
        rows.append(measure(name, arguments.size, arguments.rounds, arguments.share))
        print(f"{(time.monotonic() - begin) / 60:5.1f} min", flush=True)
        show("schedules", rows[-1:])
        keep(arguments.name, rows, about)
        gc.collect()
    show("schedules", rows)
    ratios = [row["time ratio"] for row in rows]
    at_limit = [row["time ratio at limit"] for row in rows]
    both = [each for each in at_limit if isinstance(each, float)]
    about |= {
        "slowest ratio": max(ratios),
        "median ratio": statistics.median(ratios),
        "models": len(rows),
        "both fit": len(both),
        "faster at limit": sum(each < 1 for each in both),
        "only the chosen one fits": at_limit.count("only the chosen one fits"),
        "only the default fits": at_limit.count("only the default fits"),
    }
    print({key: about[key] for key in list(about)[-7:]})
    print(keep(arguments.name, rows, about))


if __name__ == "__main__":
    main()
