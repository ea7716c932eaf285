"""Starts the ranks of a planned pipeline on this machine with torch's elastic launcher, and reads what they report."""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .errors import PipelineError, PlanError
from .ir.plan_file import load_plan
from .pipeline_steps import PlannedMesh


def launch(
    plan_path: Path, model: str, nproc: int, rounds: int, seed: int, dtype: str | None, limit: float
) -> list[dict[str, Any]]:
    """Run a planned pipeline as ``torchrun --standalone`` would; what each rank reports.

    ``limit``: seconds that ranks wait for each other. Raises PlanError when the plan is for another number of
    processes, PipelineError when a rank fails, naming it.
    """
    plan = load_plan(plan_path).plan
    planned = PlannedMesh.of(plan)
    planned.check_runs()
    if planned.mesh.ranks != nproc:
        raise PlanError(
            f"the plan is for {planned.mesh.ranks} ranks ({planned.mesh}), not {nproc}", where=str(plan_path),
            remedy=f"run it with --nproc {planned.mesh.ranks}, or plan for another mesh",
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = {
            "plan": str(plan_path), "model": model, "rounds": rounds, "seed": seed, "dtype": dtype, "limit": limit,
            "to": name,
        }  # fmt: skip
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=0, local_addr="localhost",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", f"{__package__}.pipeline_steps", json.dumps(asked))
        except ChildFailedError as error:
            said = "\n  ".join(_causes(folder, error.failures))
            raise PipelineError(
                f"a rank failed\n  {said}", where=str(plan_path), remedy="the first of these is the cause"
            ) from error
        found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda each: int(each["rank"]))


def _causes(folder: Path, failures: dict[int, ProcessFailure]) -> list[str]:
    """What there is to say of each rank that failed: first those that were killed or failed by themselves, then what
    others say of them. Ranks that the launcher does not list have ended after it stopped looking."""
    told = {int(path.stem): " ".join(map(str.strip, path.read_text().splitlines())) for path in folder.glob("*.error")}
    first, others = [], []
    for rank in sorted(failures.keys() | told.keys()):
        if rank not in told:
            failure = failures[rank]
            killed = f"was killed by {failure.signal_name()}"
            ended = f"ended with code {failure.exitcode}: {_last_line(folder, rank)}"
            first.append(f"rank {rank} {killed if failure.exitcode < 0 else ended}")
        elif told[rank].startswith(f"rank {rank}: "):
            others.append(told[rank])
        else:
            first.append(f"rank {rank}: {told[rank]}")
    return [*first, *others[:3]]


def _last_line(folder: Path, rank: int) -> str:
    """The end of what a rank wrote to its standard error."""
    lines = [
        line for path in folder.glob(f"logs/**/{rank}/stderr.log") for line in path.read_text().splitlines() if line
    ]
    return lines[-1][:300] if lines else "it wrote nothing"
