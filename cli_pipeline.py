"""``effcc plan --mesh`` and ``effcc run --nproc``: pipelines over several devices."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from .cli_support import check_writable, console, heading, open_plan, print_json, quiet_torch, stage, table
from .errors import OptionError
from .formatting import bytes_text, seconds_text


def parse_mesh(text: str) -> int:
    """Ranks of ``pp=N``. Raises OptionError for what is no mesh, or has other axes than pp."""
    found: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = part.strip().partition("=")
        if not equals or not size.isdecimal() or not int(size) or axis in found:
            raise OptionError(f"--mesh {text!r} is not understood", remedy="write pp=4")
        found[axis] = int(size)
    if other := [axis for axis in found if axis != "pp"]:
        raise OptionError(f"--mesh: axis {other[0]!r} is not planned", remedy="the axis is pp, as in pp=4")
    return found["pp"]


def plan_pipeline(
    model: str, mesh: str, microbatches: int | None, device: str, memory: int | None, dtype: str | None, output: Path,
    json: bool,
) -> None:  # fmt: skip
    """Plan a training step for the mesh, write the plan, print what was chosen."""
    ranks = parse_mesh(mesh)
    count = microbatches if microbatches is not None else 4 * ranks
    check_writable(output)
    with quiet_torch(), contextlib.redirect_stdout(sys.stderr), stage(f"plan {ranks} ranks", quiet=json):
        from .pipeline_steps import plan_file

        planned = plan_file(model, ranks=ranks, microbatches=count, device=device, memory=memory, dtype=dtype)
    from .ir.plan_file import save_plan

    save_plan(output, planned.plan, {}, {})
    chosen, run = planned.chosen, planned.chosen.found.run
    facts: dict[str, Any] = {
        "schedule": chosen.schedule.name,
        "ranks": chosen.schedule.ranks,
        "stages": chosen.schedule.stages,
        "microbatches": chosen.schedule.microbatches,
        "vocabulary": chosen.schedule.vocabulary or "first and last stage",
        "seconds": run.seconds,
        "bubble": run.bubble,
        "bound": chosen.found.bound,
        "gap": chosen.found.gap,
        "peak": list(run.peak),
        "live": list(run.live),
        "others": [{"schedule": name, "seconds": seconds} for name, seconds, _ in chosen.others],
        "plan": str(output),
    }
    if json:
        print_json(facts)
        return
    out = console()
    heading(out, planned.plan.model, f" on {ranks} x {device}: {chosen.schedule.name}, {count} microbatches")
    out.print(
        f"  {seconds_text(run.seconds)} an iteration, bubble {100 * run.bubble:.1f} %; "
        f"no order of these passes is {100 * chosen.found.gap:.2f} % faster",
        markup=False,
    )
    rows = table(
        "rank", "memory", "live microbatches", "computes", right=("rank", "memory", "live microbatches", "computes")
    )
    for rank, (peak, live, busy) in enumerate(zip(run.peak, run.live, run.compute, strict=True)):
        rows.add_row(str(rank), bytes_text(peak), str(live), seconds_text(busy))
    out.print(rows)
    for name, seconds, _ in chosen.others:
        out.print(f"  {name}: {seconds_text(seconds) if seconds is not None else 'does not fit'}", markup=False)
    out.print(f"plan:    {output}", markup=False)


def run_pipeline(plan: Path, model: str, nproc: int, rounds: int, seed: int, dtype: str | None, json: bool) -> None:
    """Run a planned pipeline on this machine and print predicted beside measured."""
    loaded = open_plan(plan).plan
    with quiet_torch(), contextlib.redirect_stdout(sys.stderr), stage(f"run on {nproc} ranks", quiet=json):
        from .pipeline_steps import launch

        ranks = launch(plan, model, nproc, rounds, seed, dtype)
    measured = max(each["seconds"] for each in ranks)
    if json:
        print_json({"predicted": {"seconds": loaded.seconds}, "measured": {"seconds": measured}, "ranks": ranks})
        return
    out = console()
    out.print(f"predicted {seconds_text(loaded.seconds)} on {loaded.device}, measured {seconds_text(measured)} here")
    rows = table("rank", "loss", "barriers a microbatch", "live microbatches", right=("rank", "loss"))
    for each in ranks:
        rows.add_row(str(each["rank"]), f"{each['loss']:.6f}", str(each["barriers"]), str(each["live"]))
    out.print(rows)
