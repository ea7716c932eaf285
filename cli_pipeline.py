"""``effcc plan --mesh`` and ``effcc run --nproc``: pipelines over several devices."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_support import check_writable, console, heading, open_plan, print_json, quiet_torch, stage, table
from .errors import OptionError
from .formatting import bytes_text, seconds_text

if TYPE_CHECKING:
    from .ir.plan import Plan


#: What to do about axes of a mesh that plans do not have.
_OTHER_AXES = {
    "ep": "experts are placed by 'effcc place-experts' and run by effcc.runtime.expert_parallel",
    "tp": "its time: 'effcc predict --mesh'; to run it, torch.distributed.tensor.parallel on the model",
    "fsdp": "its time: 'effcc predict --mesh'; to run it, torch.distributed.fsdp.fully_shard on the model",
    "cp": "its time: 'effcc predict --mesh'; to run it, torch.distributed.tensor.experimental.context_parallel",
}  # fmt: skip


def parse_mesh(text: str) -> tuple[int, int]:
    """Stages and replicas of ``pp=N,dp=M``, either of which may be missing. Raises OptionError for what is no mesh, or
    has other axes."""
    from .cost_model.parallel_training.mesh import read_axes

    found = read_axes(text, "pp=4 or pp=4,dp=2")
    if other := [axis for axis in found if axis not in ("pp", "dp")]:
        raise OptionError(
            f"--mesh: no plan has the axis {other[0]!r}; the axes are pp and dp",
            remedy=_OTHER_AXES.get(other[0], "write pp=4 or pp=4,dp=2"),
        )
    return found.get("pp", 1), found.get("dp", 1)


def plan_pipeline(
    model: str, mesh: str, microbatches: int | None, device: str, memory: int | None, dtype: str | None, output: Path,
    json: bool,
) -> None:  # fmt: skip
    """Plan a training step for the mesh, write the plan, print what was chosen."""
    ranks, replicas = parse_mesh(mesh)
    count = microbatches if microbatches is not None else 4 * ranks
    check_writable(output)
    with quiet_torch(), contextlib.redirect_stdout(sys.stderr), stage(f"plan {ranks * replicas} ranks", quiet=json):
        from .pipeline_steps import plan_file

        planned = plan_file(
            model, ranks=ranks, replicas=replicas, microbatches=count, device=device, memory=memory, dtype=dtype
        )
    from .ir.plan_file import save_plan

    save_plan(output, planned.plan, {}, {})
    chosen, run = planned.chosen, planned.chosen.found.run
    facts: dict[str, Any] = {
        "schedule": chosen.schedule.name,
        "ranks": chosen.schedule.ranks,
        "replicas": replicas,
        "stages": chosen.schedule.stages,
        "microbatches": chosen.schedule.microbatches,
        "vocabulary": chosen.schedule.vocabulary or "first and last stage",
        "seconds": run.seconds,
        "bubble": run.bubble,
        "gradient_sums": max(_sum_seconds(planned.plan), default=0.0),
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
    of = f"{ranks}" if replicas == 1 else f"{ranks} x {replicas}"
    heading(out, planned.plan.model, f" on {of} x {device}: {chosen.schedule.name}, {count} microbatches")
    out.print(
        f"  {seconds_text(run.seconds)} an iteration, bubble {100 * run.bubble:.1f} %; "
        f"no order of these passes is {100 * chosen.found.gap:.2f} % faster",
        markup=False,
    )
    if replicas > 1:
        out.print(
            f"  gradients of {replicas} replicas: {seconds_text(facts['gradient_sums'])} of sums on a rank",
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


def _sum_seconds(plan: Plan) -> list[float]:
    """Of each rank, how long its sums of gradients over the replicas take."""
    from .passes.pipeline_parallel.simulate import REPLICAS

    found: dict[int, float] = {}
    for step in plan.steps:
        if step.stream == REPLICAS:
            found[step.device] = found.get(step.device, 0.0) + step.seconds
    return list(found.values())


def run_pipeline(
    plan: Path, model: str, nproc: int, rounds: int, seed: int, dtype: str | None, limit: float, json: bool
) -> None:
    """Run a planned pipeline on this machine and print predicted beside measured."""
    loaded = open_plan(plan).plan
    with quiet_torch(), contextlib.redirect_stdout(sys.stderr), stage(f"run on {nproc} ranks", quiet=json):
        from .pipeline_launch import launch

        ranks = launch(plan, model, nproc, rounds, seed, dtype, limit)
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
