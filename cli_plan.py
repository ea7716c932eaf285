"""``effcc plan``: from a model file to a plan, a summary and a report."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from .cli_support import JsonOption, check_writable, console, heading, print_json, quiet_torch, stage, write_text
from .collector import collecting_seldom, leave_garbage
from .errors import OptionError
from .summary import device_of

if TYPE_CHECKING:
    from .ir.plan import Plan
    from .plan_request import PlanRequest
    from .planning import Planned
    from .summary import Summary


def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py[:name]", help="A file with model and example_inputs, KernelBench's Model, or a .mlir file."
        ),
    ],
    train: Annotated[bool, typer.Option("--train", help="Plan a training step, not a forward pass.")] = False,
    optimizer: Annotated[
        str | None, typer.Option(help="Count this optimizer's state (adamw, sgd, ...), not the file's.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Convert parameters and inputs: f32, bf16, f16, f64.")] = None,
    device: Annotated[
        str, typer.Option("--device", "-d", help="A name from 'effcc devices', or a device file.")
    ] = "cpu",
    memory_budget: Annotated[
        str | None,
        typer.Option("--memory-budget", metavar="SIZE", help="Most bytes on the device: 8GiB, or auto."),
    ] = None,
    swap: Annotated[
        bool, typer.Option("--swap", help="Under a budget, values may be swapped to the host as well.")
    ] = False,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Also time against memory: what each peak would cost. Needs --train.")
    ] = False,
    cascades: Annotated[
        bool, typer.Option("--cascades", help="Also which reductions could be one kernel, and why others stay.")
    ] = False,
    no_fuse: Annotated[
        bool, typer.Option("--no-fuse", help="Leave cascades as they are written: no kernels as in torch.compile.")
    ] = False,
    streams: Annotated[
        int, typer.Option("--streams", help="Most kernels at once, on streams of their own; for GPUs' plans.")
    ] = 1,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Keep the inputs' sizes symbolic.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the plan goes.")] = Path("plan.effcc"),
    report: Annotated[
        Path | None, typer.Option("--report", help="Where the HTML report goes. Default: beside the plan.")
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    emit: Annotated[
        str | None, typer.Option("--emit", metavar="mlir", help="Also write the captured graph as MLIR (extra 'mlir').")
    ] = None,
    dump_dir: Annotated[
        Path | None, typer.Option("--dump", help="Write every pass's IR to this folder (as EFFCC_DUMP does).")
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option("-p", "--passes", help="Passes to run instead of the usual ones.")
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh",
            metavar="pp=N[,dp=N,...]",
            help="Plan a training step on a mesh of devices with any of the axes pp, dp, cp, tp, fsdp, ep.",
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="With --mesh: how many nodes the devices are spread over.")
    ] = None,
    microbatches: Annotated[
        int | None, typer.Option("--microbatches", min=1, help="With --mesh; the file's inputs are one of them.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            metavar="NAME[,NAME...]",
            help="With --mesh: the schedules to choose from: gpipe, 1f1b, interleaved, zb-h1, zb-v, v-half.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Capture a model and plan its memory and time for a device, without running it.

    No weights are allocated, and the device need not be on this machine. The plan says whether the model fits, what
    holds the peak and what bounds the time.
    """
    from .plan_request import PIPELINE, PlanRequest, budget_bytes

    if mesh is not None:
        from .cli_pipeline import plan_pipeline

        memory = budget_bytes(memory_budget, device, "--memory-budget")
        plan_pipeline(model, mesh, microbatches, device, memory, dtype, output, nodes, json, schedule)
        return
    if schedule is not None:
        raise OptionError("--schedule goes with --mesh", remedy="give a mesh with pp")
    if emit not in (None, "mlir"):
        raise OptionError(f"--emit {emit!r} is not understood", remedy="the only form is mlir")
    if report is not None and no_report:
        raise OptionError("--report and --no-report exclude each other")
    request = PlanRequest(
        model=model,
        train=train,
        optimizer=optimizer,
        dtype=dtype,
        device=device,
        memory_budget=budget_bytes(memory_budget, device, "--memory-budget"),
        swap=swap,
        pareto=pareto,
        cascades=cascades,
        fuse=not no_fuse,
        streams=streams,
        dynamic=dynamic,
        pipeline=pipeline or PIPELINE,
        dump_dir=dump_dir,
    )
    if emit:
        from .frontend.mlir import torch_mlir

        torch_mlir("--emit mlir")  # before the work: it says which extra is missing
    page = None if no_report else report or output.with_suffix(".html")
    for path in (output, page):
        if path is not None:
            check_writable(path)
    leave_garbage()
    with collecting_seldom():
        _plan_and_write(request, output, page, emit is not None, json)


def _plan_and_write(request: PlanRequest, output: Path, page: Path | None, emit: bool, json: bool) -> None:
    from .planning import plan_model

    # What the model file prints goes where it cannot be taken for our output.
    with quiet_torch(), contextlib.redirect_stdout(sys.stderr):
        planned = plan_model(request, lambda description: stage(description, quiet=json))
        with stage("mlir", quiet=json or not emit):
            mlir, not_lowered = _emit_mlir(request, output) if emit else ({}, [])
    folder = Path(request.model.rpartition(".py")[0]).parent
    _finish(planned, mlir | _write(planned, output, page, request.dump_dir, folder), not_lowered, json)


def _write(planned: Planned, output: Path, report: Path | None, dump_dir: Path | None, folder: Path) -> dict[str, str]:
    """Write the files; what was written, the report last. ``folder`` is the model file's."""
    from .ir.plan_file import load_plan

    planned.save(output)
    paths = {"plan": str(output)}
    if dump_dir is not None:
        paths["passes"] = str(dump_dir)
    if report is not None:
        from .report.page import render_report

        write_text(report, render_report(load_plan(output, validate=False), dump_dir, folder=folder))
        paths["report"] = str(report)
    return paths


def _emit_mlir(request: PlanRequest, output: Path) -> tuple[dict[str, str], list[str]]:
    """Write the MLIR files; what was written, and as notes what torch-mlir does not lower to linalg."""
    from .frontend.mlir import emit_mlir

    emitted = emit_mlir(
        request.model, output, request.train, dtype=request.dtype, dynamic=True if request.dynamic else None
    )
    paths = {"mlir": str(emitted.torch_dialect)} | ({"linalg": str(emitted.linalg)} if emitted.linalg else {})
    return paths, [f"{name} is not in the linalg file: {why}" for name, why in emitted.not_lowered]


def _finish(planned: Planned, paths: dict[str, str], more_notes: list[str], json: bool) -> None:
    summary = planned.summary
    if json:
        from .activation_words import choice_figures

        print_json(
            {
                "summary": summary,
                "paths": paths,
                "notes": [*planned.plan.notes, *more_notes],
                "activations": [choice_figures(choice) for choice in planned.activations],
                "pareto": [msgspec.structs.asdict(point) for point in planned.pareto],
            }
        )
        return
    out = console()
    heading(out, planned.plan.model, f" on {planned.plan.device}")
    _print_summary(summary, planned)
    _print_pareto(planned)
    if planned.plan.cascades:
        fused = sum(found.verdict != "not" for found in planned.plan.cascades)
        out.print(
            f"  Cascades: {fused} of {len(planned.plan.cascades)} groups of dependent reductions would be one kernel; "
            f"effcc explain {paths['plan']} says why."
        )
    for note in (*planned.plan.notes, *more_notes, *_hints(planned.plan)):
        out.print(f"  note: {note}", markup=False, style="dim")
    for kind, path in paths.items():
        out.print(f"{kind + ':':8} {path}", markup=False)


def _print_summary(summary: Summary, planned: Planned) -> None:
    from .cli_explain import fallback_rows
    from .formatting import bytes_text

    out = console()
    for index, line in enumerate(summary.words):
        style = ("green" if summary.fits else "red") if index == 0 and summary.fits is not None else ""
        out.print(f"  {line}", style=style, markup=False)
    if summary.holders:
        out.print("  Most of it, at the peak:", markup=False)
    for holder in summary.holders[:3]:
        count = f"{holder.count} x " if holder.count > 1 else ""
        where = f" in {holder.place}" if holder.place and holder.place != holder.what else ""
        out.print(f"    {bytes_text(holder.bytes):>11}  {count}{holder.role}: {holder.what}{where}", markup=False)
    for row in fallback_rows(planned.plan)[:3]:
        out.print(f"  fallback {row['op']}: {row['reason']} ({row['source']})", markup=False)


def _print_pareto(planned: Planned) -> None:
    from .cli_support import table
    from .formatting import bytes_text, seconds_text

    if not planned.pareto:
        return
    columns = ("peak", "time", "more", "best possible", "kept")
    rows = table(*columns, right=columns)
    rows.title = "Time against memory"
    fastest = min(point.seconds for point in planned.pareto) or 1.0
    for point in planned.pareto:
        more = f"{100 * (point.seconds / fastest - 1):.1f} %"
        rows.add_row(
            bytes_text(point.peak), seconds_text(point.seconds), more, seconds_text(point.bound),
            bytes_text(point.saved_bytes),
        )  # fmt: skip
    console().print(rows)


def _hints(plan: Plan) -> list[str]:
    """What would make the prediction better."""
    device = device_of(plan)
    if device is not None and device.kind == "cpu" and not device.machine:
        return ["the figures for cpu are those of no machine in particular: effcc calibrate measures this one"]
    return []
