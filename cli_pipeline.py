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
    from .cost_model.devices import Device
    from .ir.plan import Plan


def device_on_nodes(device: str, ranks: int, nodes: int | None) -> Device:
    """The device, with as many to a node as the mesh has ranks for each. Raises OptionError where they do not divide,
    DeviceError for a device without a network between nodes."""
    import msgspec

    from .summary import device_named

    found = device_named(device)
    if nodes is None or nodes == 1:
        return found
    if ranks % nodes:
        raise OptionError(f"--nodes {nodes} does not divide {ranks} ranks", remedy="choose a divisor")
    found.link("cluster")  # there must be one
    links = tuple(
        msgspec.structs.replace(link, devices=ranks // nodes) if link.scope == "node" else link for link in found.links
    )
    return msgspec.structs.replace(found, links=links)


def plan_pipeline(
    model: str, mesh: str, microbatches: int | None, device: str, memory: int | None, dtype: str | None, output: Path,
    nodes: int | None, json: bool, schedules: str | None = None,
) -> None:  # fmt: skip
    """Plan a training step for the mesh, write the plan, print what was chosen."""
    from .cost_model.parallel_training.mesh import parse_mesh

    axes = parse_mesh(mesh)
    ranks, replicas = axes.pp, axes.ranks // axes.pp
    count = microbatches if microbatches is not None else 4 * ranks
    on = device_on_nodes(device, axes.ranks, nodes)
    check_writable(output)
    with quiet_torch(), contextlib.redirect_stdout(sys.stderr), stage(f"plan {axes.ranks} ranks", quiet=json):
        from .pipeline_steps import plan_file

        planned = plan_file(
            model, axes, microbatches=count, device=on, memory=memory, dtype=dtype, schedules=_schedules(schedules)
        )
    from .ir.plan_file import save_plan

    save_plan(output, planned.plan, {}, {})
    chosen, run = planned.chosen, planned.chosen.found.run
    facts: dict[str, Any] = {
        "schedule": chosen.schedule.name,
        "ranks": chosen.schedule.ranks,
        "mesh": str(axes),
        "replicas": replicas,
        "context": planned.chosen.context,
        "stages": chosen.schedule.stages,
        "microbatches": chosen.schedule.microbatches,
        "vocabulary": chosen.schedule.vocabulary or "first and last stage",
        "seconds": run.seconds,
        "bubble": run.bubble,
        "gradient_sums": max(_sum_seconds(planned.plan), default=0.0),
        "collectives": _collective_seconds(planned.plan),
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
    heading(out, planned.plan.model, f" on {of} x {device} ({axes}): {chosen.schedule.name}, {count} microbatches")
    out.print(
        f"  {seconds_text(run.seconds)} an iteration, bubble {100 * run.bubble:.1f} %; "
        f"no order of these passes is {100 * chosen.found.gap:.2f} % faster",
        markup=False,
    )
    if facts["gradient_sums"]:
        out.print(f"  gradients of replicas: {seconds_text(facts['gradient_sums'])} of sums on a rank", markup=False)
    for stream, seconds in facts["collectives"].items():
        how = f" ({chosen.context})" if stream == "context" else ""
        out.print(f"  {stream}{how}: {seconds_text(seconds)} of exchanges on a rank", markup=False)
    rows = table(
        "rank", "memory", "live microbatches", "computes", right=("rank", "memory", "live microbatches", "computes")
    )
    for rank, (peak, live, busy) in enumerate(zip(run.peak, run.live, run.compute, strict=True)):
        rows.add_row(str(rank), bytes_text(peak), str(live), seconds_text(busy))
    out.print(rows)
    for name, seconds, _ in chosen.others:
        out.print(f"  {name}: {seconds_text(seconds) if seconds is not None else 'does not fit'}", markup=False)
    out.print(f"plan:    {output}", markup=False)


def _schedules(text: str | None) -> tuple[str, ...]:
    """The names in ``--schedule``, or those that are tried without. Raises OptionError for one that is unknown."""
    from .runtime.pipeline.plan import SCHEDULES, USUAL

    if text is None:
        return USUAL
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in SCHEDULES]
    if unknown or not names:
        raise OptionError(
            f"--schedule {unknown[0] if unknown else text!r} is not known", remedy=f"some of {', '.join(SCHEDULES)}"
        )
    return names


def _sum_seconds(plan: Plan) -> list[float]:
    """Of each rank, how long its sums of gradients over the replicas take."""
    from .passes.pipeline_parallel.simulate import REPLICAS

    found: dict[int, float] = {}
    for step in plan.steps:
        if step.stream == REPLICAS:
            found[step.device] = found.get(step.device, 0.0) + step.seconds
    return list(found.values())


def _collective_seconds(plan: Plan) -> dict[str, float]:
    """Of each stream of a mesh's other axes, what the busiest rank spends on it."""
    found: dict[str, dict[int, float]] = {}
    for step in plan.steps:
        if step.stream in ("tensor", "context", "experts", "parameters"):
            ranks = found.setdefault(step.stream, {})
            ranks[step.device] = ranks.get(step.device, 0.0) + step.seconds
    return {stream: max(ranks.values()) for stream, ranks in found.items()}


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
