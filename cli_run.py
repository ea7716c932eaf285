"""``effcc run``: run a planned model here, predicted beside measured."""

from __future__ import annotations

import contextlib
import json as json_module
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_support import (
    JsonOption,
    check_writable,
    console,
    open_plan,
    print_json,
    quiet_torch,
    stage,
    table,
    write_text,
)
from .formatting import bytes_text, seconds_text


def run_command(
    plan: Annotated[Path, typer.Argument(help="A plan file made by 'effcc plan'.")],
    model: Annotated[str, typer.Argument(metavar="FILE.py[:name]", help="The model file the plan was made from.")],
    rounds: Annotated[int, typer.Option("--rounds", "-n", min=1, help="Timed runs; the median is reported.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    report: Annotated[
        Path | None, typer.Option("--report", help="Also write the HTML report, measured figures in it.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Also write a Perfetto trace: the plan's timeline, and a measured one."),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Run a pipeline's plan in so many processes (torchrun).")
    ] = None,
    rank_limit: Annotated[
        float, typer.Option("--rank-limit", min=1.0, help="With --nproc: seconds that ranks wait for each other.")
    ] = 120.0,
    json: JsonOption = False,
) -> None:
    """Run a plan's model on this machine and print predicted beside measured time and peak memory.

    The model is built with random weights from the model file, compiled with the plan, and run: a training step if the
    plan is one. Peak: the allocator's, from torch's profiler. Time: the median.
    """
    if nproc is not None:
        from .cli_pipeline import run_pipeline

        run_pipeline(plan, model, nproc, rounds, seed, None, rank_limit, json)
        return
    # Before torch is loaded: its profiler, which counts the memory, would print a line at each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from .measuring import measure

    loaded = open_plan(plan)
    for output in (report, trace):
        if output is not None:
            check_writable(output)
    events: list[dict[str, Any]] = []
    # What the model prints goes where it cannot be taken for our output.
    with quiet_torch(), contextlib.redirect_stdout(sys.stderr):
        measured = measure(
            plan, loaded.plan, model, rounds=rounds, seed=seed, progress=lambda text: stage(text, quiet=json),
            trace=events.extend if trace is not None else None,
        )  # fmt: skip
    predicted_peak = loaded.plan.peak.get("device", 0)
    if report is not None:
        from .inspection.stages import dumps_beside
        from .report.page import render_report

        figures = {"seconds": measured.seconds, "peak": measured.peak, "memory": measured.memory}
        folder = Path(model.rpartition(".py")[0]).parent
        write_text(report, render_report(loaded, dumps_beside(plan, loaded), figures, folder))
    if trace is not None:
        from .export.chrome_trace import chrome_trace

        made = chrome_trace(loaded.plan, events, measured.memory, measured.seconds)
        write_text(trace, json_module.dumps(made) + "\n")
    if json:
        print_json(
            {
                "predicted": {"seconds": loaded.plan.seconds, "peak": predicted_peak},
                "measured": measured,
                "device": loaded.plan.device,
                "report": str(report) if report is not None else None,
                "trace": str(trace) if trace is not None else None,
            }
        )
        return
    rows = table("", "predicted", "measured", "measured / predicted", right=("predicted", "measured"))
    rows.add_row(
        "time", seconds_text(loaded.plan.seconds), seconds_text(measured.seconds),
        f"{measured.seconds / loaded.plan.seconds:.3f}" if loaded.plan.seconds else "",
    )  # fmt: skip
    rows.add_row(
        "peak memory", bytes_text(predicted_peak), bytes_text(measured.peak),
        f"{measured.peak / predicted_peak:.3f}" if predicted_peak else "",
    )  # fmt: skip
    out = console()
    out.print(rows)
    if loaded.plan.device != measured.device:
        out.print(f"The plan is for {loaded.plan.device}; this machine ran it on {measured.device}.")
    if report is not None:
        out.print(f"report: {report}", markup=False)
    if trace is not None:
        out.print(f"trace:  {trace}", markup=False)
    for reason in measured.fallbacks:
        out.print(f"fallback: {reason}", markup=False)
