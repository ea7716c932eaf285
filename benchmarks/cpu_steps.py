"""Predicted beside measured time on this machine's CPU: training steps of the zoo, and variants of one model's plan.

    python benchmarks/cpu_steps.py [--models gpt2,llama] [--rounds 9] [--variants llama] [--no-calibrate] [--offline]

Calibrates first (its seconds are in the result), then compiles every model with its loss, takes the prediction of the
plan that was compiled (``--offline``: and of the plan made offline), and measures all steps in interleaved rounds, each
step after one of its own kind, as in training. ``error``: predicted over the median measured time, less one. The
variants are one model compiled without and with four memory budgets (shares of the way from the floor that a refusal
names to the peak without a budget), cascades on and off and libraries of products: twenty; Spearman's correlation is
that of their predicted and measured times.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import effcc
import torch
from common import allocator_peak, compiled, environment, interleaved, keep, models, show
from effcc import torch_internals
from effcc.calibrating import calibrate_machine
from scipy.stats import spearmanr

#: Budgets, as shares of the way from the least that works to the peak without a budget.
SHARES = (None, 0.8, 0.55, 0.3, 0.05)
#: A budget that no step keeps, so that its refusal names the least that works.
IMPOSSIBLE = 1 << 14


def compiled_step(sample: models.Sample, options: dict[str, Any]) -> tuple[Callable[[], Any], float]:
    """A training step, loss included, and the seconds that the plan of what was compiled predicts."""
    effcc.reset_reports()

    def with_loss(**inputs: torch.Tensor) -> torch.Tensor:
        return models.loss_of(sample.model(**inputs), sample.target)

    run = compiled(with_loss, backend="effcc", options=options)

    def step() -> None:
        sample.model.zero_grad(set_to_none=True)
        run(**sample.inputs).backward()

    step()
    plan = effcc.reports()[-1].plan
    return step, plan.seconds if plan is not None else float("nan")


def refusal(error: Exception) -> int:
    """The least budget that a refused one's error names, in bytes. Raises what is no such error."""
    cause = torch_internals.compile_error_cause(error)  # torch wraps what a backend raises
    named = re.search(r"(\d+) bytes", getattr(cause, "remedy", ""))
    if not isinstance(cause, effcc.errors.BudgetError) or named is None:
        raise error
    return int(named[1])


def least_budget(sample: models.Sample, options: dict[str, Any]) -> int:
    try:
        compiled_step(sample, options | {"memory_budget": IMPOSSIBLE})
    except Exception as error:
        return refusal(error)
    raise ValueError(f"a step within {IMPOSSIBLE} bytes is no model's")


def step_within(
    sample: models.Sample, options: dict[str, Any], floor: int, peak: int, share: float
) -> tuple[Callable[[], Any], float, int]:
    """A step with a budget so far up from the floor, its predicted seconds, and the floor: the one that is named where
    the budget is refused after all."""
    while True:
        try:
            budget = int(floor + share * (peak - floor))
            return (*compiled_step(sample, options | {"memory_budget": budget}), floor)
        except Exception as error:
            named = refusal(error)
            if named <= floor or named > peak:
                raise
            floor = named


def offline(sample: models.Sample) -> float:
    """Seconds that ``effcc.plan`` predicts without compiling."""
    planned = effcc.plan(sample.model, sample.inputs, train=True, loss=lambda made: models.loss_of(made, sample.target))
    return float(planned.plan.seconds)


def spearman(one: list[float], other: list[float]) -> float:
    """Rank correlation; equal values share their ranks."""
    return float(spearmanr(one, other).statistic)


def model_rows(names: list[str], size: str, rounds: int, ahead_too: bool) -> list[dict[str, Any]]:
    steps, predicted, ahead = {}, {}, {}
    for name in names:
        sample = models.build(name, size)
        steps[name], predicted[name] = compiled_step(sample, {})
        if ahead_too:
            ahead[name] = offline(sample)
        print(name, f"predicted {predicted[name] * 1e3:.1f} ms", flush=True)
    seconds = interleaved(steps, rounds, settle=1)
    rows = []
    for name in names:
        measured = statistics.median(seconds[name])
        row = {
            "model": name,
            "measured ms": measured * 1e3,
            "predicted ms": predicted[name] * 1e3,
            "error %": 100 * (predicted[name] / measured - 1),
        }
        if name in ahead:
            row |= {"offline ms": ahead[name] * 1e3, "offline error %": 100 * (ahead[name] / measured - 1)}
        rows.append(row)
    return rows


def variant_rows(name: str, size: str, rounds: int) -> tuple[list[dict[str, Any]], float]:
    sample = models.build(name, size)
    config = getattr(sample.model, "config", None)
    if config is not None:
        config._attn_implementation = "eager"  # attention written out: what cascades fuse
    held = sum(value.nbytes for value in (*sample.model.parameters(), *sample.model.buffers()))
    steps, predicted, budgets = {}, {}, {}
    for cascades, gemm in itertools.product((True, False), ("blas", "onednn")):
        floor = peak = 0
        for share in SHARES:
            label = f"cascades={cascades} gemm={gemm} budget={share}"
            options: dict[str, Any] = {"cascades": cascades, "gemm": gemm}
            if share is None:
                steps[label], predicted[label] = compiled_step(sample, options)
                peak = allocator_peak(steps[label], sample.model) + held
                floor = least_budget(sample, options)
                continue
            steps[label], predicted[label], floor = step_within(sample, options, floor, peak, share)
            budgets[label] = int(floor + share * (peak - floor))
    seconds = interleaved(steps, rounds, settle=1)
    rows = [
        {
            "variant": label,
            "budget MB": budgets.get(label, 0) / 1e6,
            "measured ms": statistics.median(seconds[label]) * 1e3,
            "predicted ms": predicted[label] * 1e3,
            "error %": 100 * (predicted[label] / statistics.median(seconds[label]) - 1),
        }
        for label in steps
    ]
    return rows, spearman([row["predicted ms"] for row in rows], [row["measured ms"] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(models.ZOO))
    parser.add_argument("--variants", default="llama")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", default="bench")
    parser.add_argument("--no-calibrate", action="store_true")
    parser.add_argument("--offline", action="store_true", help="also the prediction without compiling")
    parser.add_argument("--name", default="cpu_steps")
    arguments = parser.parse_args()
    about = environment()
    if not arguments.no_calibrate:
        begin = time.perf_counter()
        calibrate_machine()
        about["calibration seconds"] = time.perf_counter() - begin
    names = arguments.models.split(",") if arguments.models else []
    rows = model_rows(names, arguments.size, arguments.rounds, arguments.offline) if names else []
    if rows:
        errors = [abs(row["error %"]) for row in rows]
        about |= {"mean error %": statistics.mean(errors), "worst error %": max(errors)}
        show("predicted steps", rows)
    gc.collect()
    variants: list[dict[str, Any]] = []
    if arguments.variants:
        variants, about["spearman"] = variant_rows(arguments.variants, arguments.size, arguments.rounds)
        show(f"variants of {arguments.variants}", variants)
    print({key: value for key, value in about.items() if isinstance(value, float)})
    print(keep(arguments.name, [*rows, *variants], about))


if __name__ == "__main__":
    main()
