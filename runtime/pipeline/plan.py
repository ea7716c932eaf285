"""From a training step to a pipeline plan: stages, schedule, predicted time and memory of each choice.

Costs come from the device's figures: each op of a stage takes its roofline time (work over rate, or bytes over
bandwidth), a backward twice a forward, a message its bytes over the link. Every schedule that is asked for is simulated
with them; the fastest that fits the memory is taken, and what it could still gain is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...cost_model.collectives import collective_cost
from ...cost_model.devices import Device
from ...cost_model.parallel_training.mesh import Mesh, group_cost
from ...errors import PipelineError, ScheduleError
from ...passes.pipeline_parallel import classic, v_shape, vocabulary
from ...passes.pipeline_parallel.costs import PipelineCosts
from ...passes.pipeline_parallel.heuristics import Found
from ...passes.pipeline_parallel.optimal import solve
from ...passes.pipeline_parallel.precedence import Problem
from ...passes.pipeline_parallel.schedule import Schedule
from ..context_parallel.exchange import FORMS
from .axes import MeshCosts, bandwidth, short
from .stages import Stages, cut
from .step_graph import StepGraph, export_step, input_head, output_head

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "v-half")
#: Those that are tried where nothing is said.
USUAL = ("1f1b", "interleaved")
#: Kernels that S, and T, are made of: products, and what is done element by element.
_OUTPUT_KERNELS = 8


@dataclass(frozen=True)
class PipelinePlan:
    """``found`` holds the schedule, its simulated run and the bound. ``others``: what was not taken, fastest first:
    (name, seconds, bytes of the fullest rank), seconds None where it does not fit or cannot be made."""

    found: Found
    stages: Stages
    costs: PipelineCosts
    others: tuple[tuple[str, float | None, int], ...]
    mesh: Mesh = field(default_factory=Mesh)
    #: The form of attention over devices: ring or tree, where the mesh has cp.
    context: str = ""

    @property
    def schedule(self) -> Schedule:
        return self.found.schedule


def plan_pipeline(
    step: torch.nn.Module,
    microbatch: tuple[Any, ...],
    *,
    ranks: int,
    microbatches: int,
    device: Device,
    schedules: Sequence[str] = USUAL,
    vocabularies: Sequence[str] = ("", "one-barrier", "two-barriers"),
    memory: int | None = None,
    mesh: Mesh | None = None,
    capture: Callable[[], StepGraph] | None = None,
    time_limit: float = 5.0,
    seed: int = 0,
) -> PipelinePlan:
    """Plan ``step`` (a module whose result is the loss) for ``ranks`` devices, or for a mesh with that ``pp``.

    ``microbatch``: arguments of one; each data rank has ``microbatches``. ``capture``: gives the graph of one part of
    the sequence (``effcc.context_parallel``), where the mesh has ``cp``. ``schedules``: of ``SCHEDULES``.
    ``vocabularies``: "" for vocabulary layers on the first and last stage, or the algorithms that shard them; one that
    the step does not allow is passed over if there is another. ``memory``: bytes of each device, its own if None.
    Raises PipelineError or ScheduleError when nothing fits, or the mesh does not fit the model.
    """

    mesh = mesh if mesh is not None else Mesh(pp=ranks)
    state = _parameter_sizes(step)
    graph = _captured(step, microbatch, mesh, capture)
    shared = min(
        (MeshCosts(graph, mesh, device, state, form) for form in (FORMS if mesh.cp > 1 else ("",))),
        key=lambda costs: costs.context_waits(),
    )
    tried: list[tuple[str, Found | None, Stages | None, PipelineCosts | None, int]] = []
    refused: Exception | None = None
    for kind in vocabularies:
        # One rank has nothing to share, and tp shares the vocabulary already.
        if kind and (ranks == 1 or mesh.tp * mesh.fsdp > 1) and len(vocabularies) > 1:
            continue
        for name in schedules:
            if kind and name not in ("1f1b", "v-half") and len(schedules) > 1:  # they have no such passes
                continue
            label = f"{name} {kind}".strip()
            try:
                shell = make_schedule(name, ranks, microbatches, kind)
                head = output_head(graph) if kind else None
                stages = cut(graph, shell.stages, head, input_head(graph, head.size) if head else None)
                costs = stage_costs(graph, stages, shell, device, state, shared)
                room = tuple((memory or device.memory) - held for held in costs.held)
                solved = solve(Problem(shell, costs, room), [shell], time_limit=time_limit, seed=seed)
            except (PipelineError, ScheduleError) as error:
                refused = error
                tried.append((label, None, None, None, 0))
                continue
            found = replace(solved.found, schedule=replace(solved.found.schedule, name=label))
            tried.append((label, found, stages, costs, max(found.run.peak)))
    made = [each for each in tried if each[1] is not None]
    if not made:
        assert refused is not None
        raise refused
    ordered = sorted(tried, key=lambda each: each[1].run.seconds if each[1] is not None else float("inf"))
    _, found_, stages_, costs_, _ = ordered[0]
    assert found_ is not None and stages_ is not None and costs_ is not None
    others = tuple((label, each.run.seconds if each else None, peak) for label, each, _, _, peak in ordered[1:])
    return PipelinePlan(found_, stages_, costs_, others, mesh, shared.context)


def _captured(
    step: torch.nn.Module, microbatch: tuple[Any, ...], mesh: Mesh, capture: Callable[[], StepGraph] | None
) -> StepGraph:
    """The step's graph, on a mesh with cp that of one part of the sequence."""
    if mesh.cp == 1:
        return export_step(step, microbatch)
    if capture is None:
        raise PipelineError("a mesh with cp needs the graph of one part", remedy="see effcc.context_parallel")
    return capture()


def make_schedule(name: str, ranks: int, microbatches: int, kind: str = "") -> Schedule:
    """The pattern of that name, with vocabulary passes of that kind. Raises ScheduleError where there is none."""
    if name not in SCHEDULES:
        raise ScheduleError(f"schedule {name!r} is unknown", remedy=f"one of {', '.join(SCHEDULES)}")
    if name == "v-half":
        return v_shape.v_half(ranks, microbatches, kind, bool(kind))
    if kind:
        if name != "1f1b":
            raise ScheduleError(f"vocabulary passes are not woven into {name}", remedy="take 1f1b or v-half")
        return vocabulary.vocabulary_1f1b(ranks, microbatches, kind, embedding=True)
    makers = {
        "gpipe": classic.gpipe, "1f1b": classic.one_forward_one_backward, "interleaved": classic.interleaved,
        "zb-h1": classic.zero_bubble_h1, "zb-v": v_shape.zb_v,
    }  # fmt: skip
    return makers[name](ranks, microbatches)


def stage_costs(
    graph: StepGraph, stages: Stages, schedule: Schedule, device: Device, sizes: dict[str, int], mesh: MeshCosts
) -> PipelineCosts:
    """Predicted costs of the cut step. ``sizes``: bytes of each parameter by path. Replicas of a rank are neighbours;
    its neighbours in the pipeline may be on another node as soon as the mesh is larger than one."""
    shared = [mesh.stage(stage) for stage in stages.stages]
    axes, replicas = mesh.mesh, mesh.replicas
    between: list[float] = []
    for stage in stages.stages[:-1] if schedule.ranks > 1 else ():
        message = sum(_value_bytes(value.shape, value.dtype) for value in stage.sends)
        between.append(collective_cost("send", message / axes.tp, axes.ranks, device).seconds)
    held = [0] * schedule.ranks
    for stage, costs in zip(stages.stages, shared, strict=True):
        held[schedule.placement[stage.index]] += costs.held
    for rank in range(schedule.ranks):
        mine = (costs.gathered for at, costs in enumerate(shared) if schedule.placement[at] == rank)
        held[rank] += max(mine, default=0)
    output: tuple[tuple[float, float], ...] = ()
    embedding: tuple[tuple[float, float], ...] = ()
    kept: tuple[int, ...] = ()
    collective = 0.0
    if stages.output is not None:
        rows, ranks = stages.rows, schedule.ranks
        tokens, width = _elements(rows.shape[:-1]), rows.shape[-1]
        share = -(-stages.output.size // ranks)
        element = rows.dtype.itemsize
        rate = device.matrix_rate(short(rows.dtype)) * device.efficiency_of("gemm")
        product = 2.0 * tokens * width * share / rate
        # Scores are written, read for maximum and sum, and read again for the gradient.
        sweep = tokens * share * element / bandwidth(device)
        first = 2 if schedule.vocabulary == "one-barrier" else 1
        issue = _OUTPUT_KERNELS * device.launch.value
        output = ((first * product + 3 * sweep + issue, (3 - first) * product + 3 * sweep + issue),) * ranks
        kept = (tokens * share * element,) * ranks
        collective = group_cost("all_reduce", tokens * width * element, ranks, axes.stride("pp"), device).seconds
        sharded = dict.fromkeys(path for path in (stages.output_path, stages.input_path) if path)
        for rank in range(ranks):
            held[rank] += sum(mesh.state_bytes(path) // ranks for path in sharded)
        if schedule.embedding:
            moved = 3 * tokens * width * element / bandwidth(device) + device.launch.value
            embedding = ((moved, 2 * moved),) * ranks
    # The gradient of a matrix that is both output layer and embedding is whole after D.
    output_bytes, input_bytes = (
        -(-sizes[path] // schedule.ranks) if path is not None else 0
        for path in (None if stages.output_path == stages.input_path else stages.output_path, stages.input_path)
    )
    return PipelineCosts(
        forward=tuple(costs.forward for costs in shared),
        gradient=tuple(costs.gradient for costs in shared) if replicas > 1 else (),
        shard_gradient=(
            group_cost("all_reduce", output_bytes, replicas, axes.tp, device).seconds,
            group_cost("all_reduce", input_bytes, replicas, axes.tp, device).seconds,
        ),
        backward=tuple(costs.backward for costs in shared),
        beside=tuple(tuple((stream, *seconds) for stream, seconds in costs.beside.items()) for costs in shared)
        if any(costs.beside for costs in shared)
        else (),
        output=output,
        embedding=embedding,
        transfers=tuple(between),
        collective=collective,
        activation=tuple(costs.activation for costs in shared),
        output_activation=kept,
        held=tuple(held),
    )


def _value_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return _elements(shape) * dtype.itemsize


def _elements(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _parameter_sizes(step: torch.nn.Module) -> dict[str, int]:
    return {
        name: parameter.numel() * parameter.element_size()
        for name, parameter in step.named_parameters(remove_duplicate=False)
    }
