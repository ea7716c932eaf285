"""``effcc explain``: what holds the memory, what takes the time, what did not go as planned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_support import JsonOption, console, open_plan, print_json, table
from .formatting import bytes_text, count_text, seconds_text
from .suggestions import suggestions
from .summary import Summary, device_of, summarize

#: A plan's graphs are those after Inductor's rewriting, which writes some softmaxes in another way.
AFTER_INDUCTOR = (
    "these are the graphs after Inductor's passes; effcc plan --cascades looks at them as torch.compile would fuse them"
)

if TYPE_CHECKING:
    from rich.console import Console

    from .cost_model.devices import Device
    from .ir.plan import CascadeVerdict, Plan
    from .ir.plan_file import PlanFile


def explain_command(
    plan: Annotated[Path, typer.Argument(help="A plan file made by 'effcc plan'.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Rows in each table.")] = 10,
    cascades: Annotated[
        bool,
        typer.Option("--cascades", help="Also which reductions could be one kernel, and why others stay. Seconds."),
    ] = False,
    schedule: Annotated[
        bool,
        typer.Option("--schedule", help="Also the schedule as a model: decisions, alternatives, bounds and gaps."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Explain a plan: who holds the peak, what is slow and why, which ops fell back, what the solvers proved."""
    file = open_plan(plan)
    loaded = file.plan
    summary = summarize(loaded)
    verdicts, skipped = _verdicts(file) if cascades or loaded.cascades else ([], [])
    if json:
        more: dict[str, object] = {"cascades": verdicts, "notes": skipped} if cascades or loaded.cascades else {}
        rows = {"summary": summary, "fallbacks": fallback_rows(loaded), "solvers": solver_rows(loaded)}
        if schedule:
            from .inspection.schedule import figures

            more["schedule"] = figures(loaded)
        print_json(rows | {"suggestions": suggestions(loaded, summary)} | more)
        return
    out = console()
    print_explanation(out, loaded, summary, top)
    if cascades or loaded.cascades:
        _cascades(out, verdicts, skipped)
    if schedule:
        _schedule(out, loaded)


def _schedule(out: Console, plan: Plan) -> None:
    from .cost_model.step_bounds import step_bounds
    from .inspection.schedule import LEGEND, chosen_words, decisions, gap_of, others, rows, taken, value_text, words

    bounds = step_bounds(plan)
    for line in words(plan, bounds):
        out.print(line, markup=False, soft_wrap=True)
    if len(bounds.streams) > 1:
        loads = table("stream", "steps", "busy", "alone", right=("steps", "busy", "alone"), title="Streams")
        for load in bounds.streams:
            loads.add_row(
                f"{load.device}: {load.stream}", str(load.steps), seconds_text(load.busy), seconds_text(load.alone)
            )
        out.print(loads)
    found = rows(decisions(plan))
    if not found:
        out.print("Nothing was to be chosen: every op runs as it is written.")
        return
    made = table("decision", "about", "chosen", "value", "instead of", "bound", "gap", right=("value", "bound", "gap"))
    made.title = "What was decided"
    for each in found:
        value, gap = taken(each), gap_of(each)
        made.add_row(
            each.kind, each.subject, chosen_words(each), value_text(value, each.unit) if value is not None else "",
            others(each), value_text(each.bound, each.unit) if each.bound is not None else "",
            f"{100 * gap:.2f} %" if gap is not None else "",
        )  # fmt: skip
    out.print(made)
    for kind in dict.fromkeys(each.kind for each in found):
        if kind in LEGEND:
            out.print(f"{kind}: {LEGEND[kind]}.", markup=False, soft_wrap=True)


def _verdicts(file: PlanFile) -> tuple[list[CascadeVerdict], list[str]]:
    """As recorded in the plan, else of its graphs."""
    from .inspection.candidates import cascade_verdicts
    from .inspection.stages import graphs_of

    if file.plan.cascades:
        return list(file.plan.cascades), []
    found, skipped = cascade_verdicts(graphs_of(file))
    return found, [*skipped, AFTER_INDUCTOR]


def _cascades(out: Console, verdicts: list[CascadeVerdict], skipped: list[str]) -> None:
    if not verdicts:
        out.print("No dependent reductions: nothing could be fused into a one-pass kernel.")
    rows = table("fused", "where", "module", "tensor", "why", title="Cascades: dependent reductions as one kernel")
    for each in verdicts:
        rows.add_row(each.verdict, each.source, each.module, each.tensor, each.why)
    if verdicts:
        out.print(rows)
    for line in skipped:
        out.print(f"note: {line}", markup=False)


def print_explanation(out: Console, plan: Plan, summary: Summary, top: int) -> None:
    for line in summary.words:
        out.print(line, markup=False)
    for number, line in enumerate(suggestions(plan, summary), start=1):
        out.print(f"  {number}. {line}", markup=False)
    _holders(out, summary, top)
    _steps(out, plan, summary, top)
    _fallbacks(out, plan, top)
    _solvers(out, plan)
    for note in plan.notes:
        out.print(f"note: {note}", markup=False)


def _holders(out: Console, summary: Summary, top: int) -> None:
    if not summary.holders:
        return
    rows = table("bytes", "share", "role", "count", "what", "where", right=("bytes", "share", "count"))
    rows.title = f"What holds the peak (step {summary.peak_position})"
    total = max(summary.peak, 1)
    for holder in summary.holders[:top]:
        share = f"{100 * holder.bytes / total:.1f} %"
        role = holder.role if holder.decision == "keep" else f"{holder.role} ({holder.decision})"
        where = holder.place if holder.place != holder.what else ""
        rows.add_row(bytes_text(holder.bytes), share, role, str(holder.count), holder.what, where)
    rest = sum(holder.bytes for holder in summary.holders[top:])
    if rest:
        rows.add_row(bytes_text(rest), f"{100 * rest / total:.1f} %", "", "", f"{len(summary.holders) - top} more", "")
    out.print(rows)


def why(seconds: float, flop: int, moved: int, bound: str, device: Device | None, dtype: str, count: int) -> str:
    """A step group's bound in words, with the rate it reaches against the device's peak."""
    if device is None or seconds <= 0:
        return bound
    if bound == "compute":
        rate, peak = flop / seconds, device.matrix_rate(dtype or "f32")
        return f"compute: {count_text(rate, 'FLOP/s')}, {100 * rate / peak:.0f} % of peak"
    if bound == "memory":
        rate = moved / seconds
        return f"memory: {count_text(rate, 'B')}/s, {100 * rate / device.bandwidth:.0f} % of peak"
    if bound == "launch":
        return f"launch: {seconds_text(device.launch.value)} for each of {count}"
    return bound


def _steps(out: Console, plan: Plan, summary: Summary, top: int) -> None:
    if not summary.groups:
        return
    device = device_of(plan)
    rows = table("time", "share", "times", "step", "phase", "why", "where", right=("time", "share", "times"))
    rows.title = "Where the time goes"
    total = sum(group.seconds for group in summary.groups) or 1.0
    for group in summary.groups[:top]:
        reason = why(group.seconds, group.flop, group.bytes_moved, group.bound, device, plan.dtype, group.count)
        share = f"{100 * group.seconds / total:.1f} %"
        rows.add_row(
            seconds_text(group.seconds), share, str(group.count), f"{group.kind} {group.name}", group.phase, reason,
            group.place,
        )  # fmt: skip
    out.print(rows)


def fallback_rows(plan: Plan) -> list[dict[str, str]]:
    return [{"op": op, "reason": reason, "source": source} for op, reason, source in plan.fallbacks]


def _fallbacks(out: Console, plan: Plan, top: int) -> None:
    if not plan.fallbacks:
        out.print("No fallbacks: every op runs the planned way.")
        return
    rows = table("op", "reason", "where", title=f"Fallbacks ({len(plan.fallbacks)})")
    for op, reason, source in plan.fallbacks[:top]:
        rows.add_row(op, reason, source)
    out.print(rows)


def solver_rows(plan: Plan) -> list[dict[str, object]]:
    return [
        {
            "problem": solver.problem,
            "solver": solver.name,
            "value": solver.value,
            "bound": solver.bound,
            "gap": solver.gap,
            "seconds": solver.seconds,
            "seed": solver.seed,
        }
        for solver in plan.solvers
    ]


def _solvers(out: Console, plan: Plan) -> None:
    if not plan.solvers:
        return
    rows = table("decision", "solver", "value", "bound", "gap", "time", right=("value", "bound", "gap", "time"))
    rows.title = "How it was decided"
    for solver in plan.solvers:
        rows.add_row(
            solver.problem, solver.name, f"{solver.value:,.9g}", f"{solver.bound:,.9g}", f"{100 * solver.gap:.2f} %",
            seconds_text(solver.seconds),
        )  # fmt: skip
    out.print(rows)
