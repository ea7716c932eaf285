"""From a training step to a pipeline plan: stages, schedule, predicted time and memory of each choice.

Costs come from the device's figures: each op of a stage takes its roofline time (work over rate, or bytes over
bandwidth), a backward twice a forward, a message its bytes over the link. Every schedule that is asked for is simulated
with them; the fastest that fits the memory is taken, and what it could still gain is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ...cost_model.collectives import collective_cost
from ...cost_model.devices import Device
from ...errors import PipelineError, ScheduleError
from ...ir.types import SHORT_DTYPE
from ...passes.pipeline_parallel import classic, v_shape, vocabulary
from ...passes.pipeline_parallel.costs import PipelineCosts
from ...passes.pipeline_parallel.heuristics import Found
from ...passes.pipeline_parallel.optimal import solve
from ...passes.pipeline_parallel.precedence import Problem
from ...passes.pipeline_parallel.schedule import Schedule
from .stages import Stage, Stages, cut, node_flop
from .step_graph import StepGraph, export_step, input_head, output_head

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "v-half")
#: A backward does about twice a forward's work: gradients of inputs and of weights.
_BACKWARD = 2.0
#: Kernels that S, and T, are made of: products, and what is done element by element.
_OUTPUT_KERNELS = 8
_VIEWS = ("view", "reshape", "transpose", "unsqueeze", "expand", "slice", "getitem", "alias", "permute", "split")


@dataclass(frozen=True)
class PipelinePlan:
    """``found`` holds the schedule, its simulated run and the bound. ``others``: what was not taken, fastest first:
    (name, seconds, bytes of the fullest rank), seconds None where it does not fit or cannot be made."""

    found: Found
    stages: Stages
    costs: PipelineCosts
    others: tuple[tuple[str, float | None, int], ...]

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
    schedules: Sequence[str] = ("1f1b", "interleaved"),
    vocabularies: Sequence[str] = ("", "one-barrier", "two-barriers"),
    memory: int | None = None,
    replicas: int = 1,
    time_limit: float = 5.0,
    seed: int = 0,
) -> PipelinePlan:
    """Plan ``step`` (a module whose result is the loss) for ``ranks`` devices, or ``replicas`` times as many.

    ``microbatch``: arguments of one; each replica has ``microbatches``. ``schedules``: of ``SCHEDULES``.
    ``vocabularies``: "" for vocabulary layers on the first and last stage, or the algorithms that shard them; one that
    the step does not allow is passed over if there is another. ``memory``: bytes of each device, its own if None.
    Raises PipelineError or ScheduleError when nothing fits.
    """
    graph = export_step(step, microbatch)
    state = _parameter_sizes(step)
    tried: list[tuple[str, Found | None, Stages | None, PipelineCosts | None, int]] = []
    refused: Exception | None = None
    for kind in vocabularies:
        for name in schedules:
            if kind and name not in ("1f1b", "v-half") and len(schedules) > 1:  # they have no such passes
                continue
            label = f"{name} {kind}".strip()
            try:
                shell = make_schedule(name, ranks, microbatches, kind)
                head = output_head(graph) if kind else None
                stages = cut(graph, shell.stages, head, input_head(graph, head.size) if head else None)
                costs = stage_costs(graph, stages, shell, device, state, replicas)
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
    return PipelinePlan(found_, stages_, costs_, others)


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
    graph: StepGraph, stages: Stages, schedule: Schedule, device: Device, sizes: dict[str, int], replicas: int = 1
) -> PipelineCosts:
    """Predicted costs of the cut step. ``sizes``: bytes of each parameter by path. Replicas of a rank are neighbours;
    its neighbours in the pipeline may be on another node as soon as the mesh is larger than one."""
    forward = tuple(_forward_seconds(stage, device) for stage in stages.stages)
    message = max(
        (sum(_value_bytes(value.shape, value.dtype) for value in stage.sends) for stage in stages.stages[:-1]),
        default=0,
    )
    everyone = schedule.ranks * replicas
    between = collective_cost("send", message, everyone, device).seconds if schedule.ranks > 1 else 0.0
    held = [0] * schedule.ranks
    for stage in stages.stages:
        paths = _parameters(stage)
        held[schedule.placement[stage.index]] += sum(_state_bytes(sizes[path]) for path in paths)
    output: tuple[tuple[float, float], ...] = ()
    embedding: tuple[tuple[float, float], ...] = ()
    kept: tuple[int, ...] = ()
    collective = 0.0
    if stages.output is not None:
        rows, ranks = stages.rows, schedule.ranks
        tokens, width = _elements(rows.shape[:-1]), rows.shape[-1]
        share = -(-stages.output.size // ranks)
        element = rows.dtype.itemsize
        rate = device.matrix_rate(_short(rows.dtype)) * device.efficiency_of("gemm")
        product = 2.0 * tokens * width * share / rate
        # Scores are written, read for maximum and sum, and read again for the gradient.
        sweep = tokens * share * element / _bandwidth(device)
        first = 2 if schedule.vocabulary == "one-barrier" else 1
        issue = _OUTPUT_KERNELS * device.launch.value
        output = ((first * product + 3 * sweep + issue, (3 - first) * product + 3 * sweep + issue),) * ranks
        kept = (tokens * share * element,) * ranks
        collective = collective_cost("all_reduce", tokens * width * element, ranks, device).seconds
        sharded = dict.fromkeys(path for path in (stages.output_path, stages.input_path) if path)
        for rank in range(ranks):
            held[rank] += sum(_state_bytes(sizes[path]) // ranks for path in sharded)
        if schedule.embedding:
            moved = 3 * tokens * width * element / _bandwidth(device) + device.launch.value
            embedding = ((moved, 2 * moved),) * ranks
    summed = [
        collective_cost("all_reduce", sum(sizes[path] for path in _parameters(stage)), replicas, device).seconds
        for stage in stages.stages
    ]
    # The gradient of a matrix that is both output layer and embedding is whole after D.
    output_bytes, input_bytes = (
        -(-sizes[path] // schedule.ranks) if path is not None else 0
        for path in (None if stages.output_path == stages.input_path else stages.output_path, stages.input_path)
    )
    return PipelineCosts(
        forward=forward,
        gradient=tuple(summed) if replicas > 1 else (),
        shard_gradient=(
            collective_cost("all_reduce", output_bytes, replicas, device).seconds,
            collective_cost("all_reduce", input_bytes, replicas, device).seconds,
        ),
        backward=tuple(_BACKWARD * seconds for seconds in forward),
        output=output,
        embedding=embedding,
        transfer=between,
        collective=collective,
        activation=tuple(_activation(stage) for stage in stages.stages),
        output_activation=kept,
        held=tuple(held),
    )


def _forward_seconds(stage: Stage, device: Device) -> float:
    total = 0.0
    for node in _computed(stage):
        value = node.meta["val"]
        traffic = sum(map(_node_bytes, (node, *node.all_input_nodes)))
        seconds = traffic / _bandwidth(device)
        if (flop := node_flop(node)) > 4.0 * value.numel():
            seconds = max(seconds, flop / (device.matrix_rate(_short(value.dtype)) * device.efficiency_of("gemm")))
        total += seconds + device.launch.value
    return total


def _parameters(stage: Stage) -> set[str]:
    """Paths of what the stage reads of the model."""
    return {argument.name for argument in stage.arguments if argument.kind == "parameter"}


def _activation(stage: Stage) -> int:
    """Bytes between forward and backward: what the ops of the stage make. An upper estimate, autograd keeps less."""
    return int(sum(map(_node_bytes, _computed(stage))))


def _computed(stage: Stage) -> Iterable[Node]:
    """Ops that write a tensor, not those that look at one another way."""
    for node in stage.module.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
            if name not in _VIEWS:
                yield node


def _node_bytes(node: Node) -> float:
    value = node.meta.get("val")
    return float(value.numel() * value.element_size()) if isinstance(value, torch.Tensor) else 0.0


def _value_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return _elements(shape) * dtype.itemsize


def _elements(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _state_bytes(size: int) -> int:
    """A parameter of ``size`` bytes with its gradient and Adam's two moments, all of its own type."""
    return 4 * size


def _parameter_sizes(step: torch.nn.Module) -> dict[str, int]:
    return {
        name: parameter.numel() * parameter.element_size()
        for name, parameter in step.named_parameters(remove_duplicate=False)
    }


def _bandwidth(device: Device) -> float:
    return device.bandwidth * device.efficiency_of("memory")


def _short(dtype: torch.dtype) -> str:
    return SHORT_DTYPE[str(dtype).removeprefix("torch.")]
