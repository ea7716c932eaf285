"""Pipelines of model files: planned without weights, and run by one process a rank.

The file's ``example_inputs`` are one microbatch. The step is the model and its loss: the file's ``loss``, the output's
``.loss``, or the sum of the outputs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from .cost_model.devices import load_device
from .errors import PipelineError, PlanError
from .frontend.inputs import check_inputs, convert
from .frontend.model_file import ModelSpec, load_model_file, parse_dtype
from .frontend.without_weights import Weightless
from .ir.plan import Plan
from .ir.plan_file import load_plan
from .passes.pipeline_parallel.plan import from_plan, to_plan
from .runtime.pipeline.executor import PipelineRank
from .runtime.pipeline.plan import PipelinePlan, plan_pipeline
from .runtime.pipeline.stages import cut
from .runtime.pipeline.step_graph import export_step, input_head, output_head


class FileStep(torch.nn.Module):
    """A model file's model with its loss, called with the tensors of one microbatch."""

    def __init__(self, spec: ModelSpec, model: torch.nn.Module, structure: Any) -> None:
        super().__init__()
        self.model = model
        self._loss, self._structure = spec.loss, structure

    def forward(self, *leaves: Any) -> torch.Tensor:
        args, kwargs, targets = pytree.tree_unflatten(list(leaves), self._structure)
        outputs = self.model(*args, **kwargs)
        if self._loss is not None:
            loss = self._loss(outputs, *targets)
        elif getattr(outputs, "loss", None) is not None:
            loss = outputs.loss
        else:
            tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
            loss = torch.stack([tensor.sum() for tensor in tensors if tensor.is_floating_point()]).sum()
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise PipelineError("the loss is not one number", remedy="let the file's loss return a scalar tensor")
        return loss


def file_step(spec: ModelSpec, dtype: str | None = None) -> tuple[FileStep, tuple[Any, ...]]:
    """The step of a model file in training mode, and the leaves of its example inputs."""
    model = spec.build_model()
    args, kwargs = spec.example_inputs()
    check_inputs(spec.name, (args, kwargs))
    wanted = parse_dtype(dtype) if dtype else None
    if wanted is not None:
        model = model.to(wanted)
        args, kwargs = convert(args, wanted), convert(kwargs, wanted)
    leaves, structure = pytree.tree_flatten((args, kwargs, spec.targets() if spec.targets is not None else ()))
    return FileStep(spec, model.train(), structure), tuple(leaves)


@dataclass(frozen=True)
class PlannedPipeline:
    """What was planned: the choice, and the plan for the file."""

    chosen: PipelinePlan
    plan: Plan


def plan_file(
    model: str, *, ranks: int, microbatches: int, device: str, memory: int | None, dtype: str | None
) -> PlannedPipeline:
    """Plan the training step of a model file for ``ranks`` devices, without allocating weights."""
    weightless = Weightless()
    with weightless.building():
        spec = load_model_file(model)
        step, leaves = file_step(spec, dtype)
    with weightless.tracing():
        chosen = plan_pipeline(
            step, leaves, ranks=ranks, microbatches=microbatches, device=load_device(device), memory=memory
        )
    plan = to_plan(chosen.found, model=spec.name, device=device, held=chosen.costs.held)
    return PlannedPipeline(chosen, plan)


def run_rank(plan_path: Path, model: str, rounds: int, seed: int, dtype: str | None) -> dict[str, Any]:
    """One rank of a planned pipeline, in a process of torch.distributed's launcher: median seconds of a step (after one
    that is not counted), the loss, the barriers a microbatch, the most live microbatches."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    try:
        schedule = from_plan(load_plan(plan_path).plan)
        torch.manual_seed(seed)
        step, first = file_step(load_model_file(model), dtype)
        graph = export_step(step, first)
        head = output_head(graph) if schedule.vocabulary else None
        embedding = input_head(graph, head.size) if head is not None and schedule.embedding else None
        state = {
            **dict(step.named_parameters(remove_duplicate=False)),
            **dict(step.named_buffers(remove_duplicate=False)),
        }
        stages = cut(graph, schedule.stages, head, embedding)
        pipeline = PipelineRank(schedule, stages, state)
        batch = [_tensors(first)] * schedule.microbatches
        seconds = []
        for number in range(rounds + 1):
            dist.barrier()
            begin = time.perf_counter()
            report = pipeline.step(batch)
            dist.barrier()
            if number:
                seconds.append(time.perf_counter() - begin)
        pipeline.close()
        return {
            "rank": dist.get_rank(),
            "seconds": statistics.median(seconds),
            "loss": report.loss,
            "barriers": max(report.barriers.values(), default=0),
            "live": max(report.live.values(), default=0),
        }
    finally:
        dist.destroy_process_group()


def _tensors(leaves: Sequence[Any]) -> list[Any]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def launch(plan_path: Path, model: str, nproc: int, rounds: int, seed: int, dtype: str | None) -> list[dict[str, Any]]:
    """Run a planned pipeline with torch's launcher (``torchrun``) on this machine; what each rank reports.

    Raises PlanError when the plan is for another number of ranks, PipelineError when a rank fails.
    """
    import subprocess
    import tempfile

    schedule = from_plan(load_plan(plan_path).plan)
    if schedule.ranks != nproc:
        raise PlanError(
            f"the plan is for {schedule.ranks} ranks, not {nproc}", where=str(plan_path),
            remedy=f"run it with --nproc {schedule.ranks}, or plan for a mesh with pp={nproc}",
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked = {"plan": str(plan_path), "model": model, "rounds": rounds, "seed": seed, "dtype": dtype, "to": folder}
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc),
            "-m", f"{__package__}.pipeline_steps", json.dumps(asked),
        ]  # fmt: skip
        variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    if done.returncode or len(found) < nproc:
        lines = [line for line in done.stderr.splitlines() if "Error: " in line or " at rank " in line]
        said = "\n  ".join(line.split("]: ")[-1].strip() for line in lines[:3]) or done.stderr.strip()[-500:]
        raise PipelineError(f"a rank failed\n  {said}", where=str(plan_path), remedy="its own message is above")
    return found


def _worker(text: str) -> None:
    asked = json.loads(text)
    found = run_rank(Path(asked["plan"]), asked["model"], asked["rounds"], asked["seed"], asked["dtype"])
    (Path(asked["to"]) / f"{found['rank']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _worker(sys.argv[1])
