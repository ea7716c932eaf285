"""Pipelines of model files: planned without weights, and run by one process a rank.

The file's ``example_inputs`` are one microbatch. The step is the model and its loss: the file's ``loss``, the output's
``.loss``, or the sum of the outputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree

from .context_parallel import split_sequence
from .cost_model.devices import Device
from .cost_model.parallel_training.mesh import Mesh
from .errors import EffccError, OptionError, PipelineError, PlanError
from .frontend.inputs import check_inputs, convert
from .frontend.model_file import ModelSpec, load_model_file, parse_dtype
from .frontend.without_weights import Weightless
from .ir.plan import Plan
from .ir.plan_file import load_plan
from .passes.pipeline_parallel.plan import from_plan, mesh_of, replicas_of, to_plan
from .runtime.context_parallel.exchange import SequenceGroup
from .runtime.mesh_layout import MeshLayout, timed_mesh
from .runtime.pipeline.executor import PipelineRank
from .runtime.pipeline.plan import USUAL, PipelinePlan, plan_pipeline
from .runtime.pipeline.stages import cut
from .runtime.pipeline.step_graph import export_step, input_head, output_head
from .runtime.process_group import join_group

#: Seconds that a rank goes on after the launcher asked it to end.
_GRACE = 15.0


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


def fingerprint(step: FileStep, leaves: Sequence[Any]) -> str:
    """Differs where a plan of one model and microbatch is no plan of another: names and shapes of parameters, shapes of
    inputs. Types are left out: the plan of a bf16 step runs in f32 where there are no such units."""
    parameters = [(path, tuple(each.shape)) for path, each in step.named_parameters()]
    inputs = [tuple(leaf.shape) for leaf in _tensors(leaves)]
    return hashlib.sha256(repr((parameters, inputs)).encode()).hexdigest()


def _check_model(plan: Plan, step: FileStep, leaves: Sequence[Any]) -> None:
    made_for = plan.graphs[0].graph_hash if plan.graphs else ""
    if made_for and made_for != fingerprint(step, leaves):
        raise PlanError(
            "the plan was made for another model, or for other inputs", where=plan.model,
            remedy="make it anew with effcc plan",
        )  # fmt: skip


@dataclass(frozen=True)
class PlannedPipeline:
    """What was planned: the choice, and the plan for the file."""

    chosen: PipelinePlan
    plan: Plan


def plan_file(
    model: str,
    mesh: Mesh,
    *,
    microbatches: int,
    device: Device,
    memory: int | None,
    dtype: str | None,
    schedules: Sequence[str] = USUAL,
) -> PlannedPipeline:
    """Plan the training step of a model file for a mesh of devices, without allocating weights."""
    weightless = Weightless()
    with weightless.building():
        spec = load_model_file(model)
        step, leaves = file_step(spec, dtype)
    with weightless.tracing():
        chosen = plan_pipeline(
            step, leaves, ranks=mesh.pp, mesh=mesh, microbatches=microbatches, device=device, memory=memory,
            capture=lambda: split_sequence(step, leaves, mesh.cp), schedules=schedules,
        )  # fmt: skip
    everyone = mesh.ranks // mesh.pp
    made_for = f"{mesh}" + (f",context={chosen.context}" if chosen.context else "")
    plan = to_plan(
        chosen.found, model=spec.name, device=device.name, graph_hash=fingerprint(step, leaves),
        held=chosen.costs.held, replicas=everyone, mesh=made_for,
    )  # fmt: skip
    return PlannedPipeline(chosen, plan)


@dataclass(frozen=True)
class PlannedMesh:
    """What a plan was made for: its mesh, and the form of attention over devices."""

    mesh: Mesh
    context: str

    @classmethod
    def of(cls, plan: Plan) -> PlannedMesh:
        """Raises ScheduleError for a plan of something else than a pipeline, PlanError for axes that do not fit."""
        ranks, replicas = from_plan(plan).ranks, replicas_of(plan)
        written = dict(part.partition("=")[::2] for part in mesh_of(plan).split(",") if part)
        context = written.pop("context", "")
        mesh = Mesh(**{axis: int(size) for axis, size in written.items()}) if written else Mesh(pp=ranks, dp=replicas)
        if mesh.pp != ranks or mesh.ranks != ranks * replicas:
            raise PlanError(f"the plan's steps are not those of {mesh}", remedy="make the plan anew")
        return cls(mesh, context)

    def check_runs(self) -> None:
        """Raises OptionError for a mesh that ``effcc run`` does not run, saying what does."""
        mesh = self.mesh
        if mesh.ep > 1:
            raise OptionError(
                "a plan with ep is not run by effcc run", where=str(mesh),
                remedy="effcc place-experts, and effcc.runtime.expert_parallel.parallelize_experts in a program",
            )  # fmt: skip
        if self.sharded_by_torch and mesh.pp * mesh.cp > 1:
            raise OptionError(
                "tp and fsdp are run without pp and cp", where=str(mesh),
                remedy="plan pp, dp and cp, or dp, fsdp and tp",
            )  # fmt: skip

    @property
    def sharded_by_torch(self) -> bool:
        """Whether FSDP2 or DTensor runs it."""
        return self.mesh.tp * self.mesh.fsdp > 1


def run_rank(plan_path: Path, model: str, rounds: int, seed: int, dtype: str | None, limit: float) -> dict[str, Any]:
    """One rank of a planned pipeline, in a process of torch.distributed's launcher: median seconds of a step (after one
    that is not counted), the loss, the barriers a microbatch, the most live microbatches. ``limit``: seconds that ranks
    wait for each other. Raises PipelineError naming rank and step."""
    join_group(limit=limit)
    try:
        plan = load_plan(plan_path).plan
        schedule, planned = from_plan(plan), PlannedMesh.of(plan)
        axes = planned.mesh
        if planned.sharded_by_torch:
            return _run_sharded(axes, plan, schedule.microbatches, model, rounds, seed, dtype, limit)
        mesh = init_device_mesh("cpu", (axes.pp, axes.dp, axes.cp), mesh_dim_names=("pp", "dp", "cp"))
        torch.manual_seed(seed)
        step, first = file_step(load_model_file(model), dtype)
        _check_model(plan, step, first)
        sequence = None
        if axes.cp > 1:
            layout = MeshLayout.of(mesh, "pp", PipelineError)
            sequence = SequenceGroup(layout.sequence_group(timedelta(seconds=limit)))
            graph = split_sequence(step, first, axes.cp, group=sequence, form=planned.context)
        else:
            graph = export_step(step, first)
        head = output_head(graph) if schedule.vocabulary else None
        embedding = input_head(graph, head.size) if head is not None and schedule.embedding else None
        state = {
            **dict(step.named_parameters(remove_duplicate=False)),
            **dict(step.named_buffers(remove_duplicate=False)),
        }
        stages = cut(graph, schedule.stages, head, embedding)
        pipeline = PipelineRank(schedule, stages, state, timeout=timedelta(seconds=limit), mesh=mesh, sequence=sequence)
        batch = [_tensors(first)] * schedule.microbatches
        seconds = []
        for number in range(rounds + 1):
            pipeline.watch.collective("a round's begin", dist.barrier)
            begin = time.perf_counter()
            report = pipeline.step(batch)
            pipeline.watch.collective("a round's end", dist.barrier)
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
        if sys.exc_info()[0] is None:  # else it would wait for what the others no longer do
            dist.destroy_process_group()


def _run_sharded(
    axes: Mesh, plan: Plan, microbatches: int, model: str, rounds: int, seed: int, dtype: str | None, limit: float
) -> dict[str, Any]:
    """``run_rank`` of a mesh whose parameters torch shards."""
    from .runtime.torch_sharding import ShardedStep

    patience = timedelta(seconds=limit)
    mesh = timed_mesh("cpu", (axes.dp, axes.fsdp, axes.tp), ("dp", "fsdp", "tp"), patience)
    torch.manual_seed(seed)
    step, first = file_step(load_model_file(model), dtype)
    _check_model(plan, step, first)
    sharded = ShardedStep(step, mesh, export_step(step, first) if axes.tp > 1 else None, patience)
    seconds, loss = [], 0.0
    for number in range(rounds + 1):
        sharded.watch.collective("a round's begin", dist.barrier)
        begin = time.perf_counter()
        loss = sharded.step([_tensors(first)] * microbatches)
        sharded.watch.collective("a round's end", dist.barrier)
        if number:
            seconds.append(time.perf_counter() - begin)
    sharded.watch.close()
    return {
        "rank": dist.get_rank(), "seconds": statistics.median(seconds), "loss": loss, "barriers": 0, "live": 1,
    }  # fmt: skip


def _tensors(leaves: Sequence[Any]) -> list[Any]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _worker(text: str) -> int:
    """A process of the launcher: writes what the rank reports, or the message it ends with, to a file of its own."""
    asked = json.loads(text)
    folder, rank = Path(asked["to"]), os.environ["RANK"]
    # The launcher ends all ranks as soon as one has failed. They end by themselves, and say first what they know.
    signal.signal(signal.SIGTERM, lambda *_: _end_later())
    # One machine: its own name need not have an address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        found = run_rank(
            Path(asked["plan"]), asked["model"], asked["rounds"], asked["seed"], asked["dtype"], asked["limit"]
        )
    except EffccError as error:
        (folder / f"{rank}.error").write_text(str(error))
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)  # without waiting for collectives that have begun
    (folder / f"{rank}.json").write_text(json.dumps(found))
    return 0


def _end_later() -> None:
    timer = threading.Timer(_GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(_worker(sys.argv[1]))
