"""Costs of a cut step, measured pass by pass: what a simulated schedule is made of.

Passes are run as ``runtime.pipeline.executor`` runs them, on the values and gradients that stages really hand on:
numbers of another size may overflow or lose their normal form on the way, which takes many times as long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from effcc.passes.pipeline_parallel import classic
from effcc.passes.pipeline_parallel.costs import PipelineCosts
from effcc.passes.pipeline_parallel.schedule import Schedule
from effcc.passes.pipeline_parallel.simulate import simulate
from effcc.passes.pipeline_parallel.vocabulary_cascade import output_cascade
from effcc.runtime.pipeline.executor import PipelineRank
from effcc.runtime.pipeline.output_layer import OutputLayer, Shard
from effcc.runtime.pipeline.stages import Stage, Stages, Value, cut
from effcc.runtime.pipeline.step_graph import export_step
from torch import nn

ROUNDS = 5


def seconds(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median time of a call, after one that is not counted."""
    run()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def measured_costs(
    schedule: Schedule, stages: Stages, step: nn.Module, microbatch: Sequence[torch.Tensor], exchange: float
) -> PipelineCosts:
    """Costs of the schedule on all ranks of the default group, which call this together. ``exchange``: seconds, see
    ``exchange_seconds``."""
    passes = _Passes(schedule, stages, step, microbatch)
    forward, backward, weight = passes.seconds()
    output, embedding, collective = passes.vocabulary() if stages.output is not None else ((), (), 0.0)
    return PipelineCosts(
        forward=forward, backward=backward, weight=weight if schedule.split_backward else (), output=output,
        embedding=embedding if schedule.embedding else (), collective=collective, exchange=exchange,
        transfers=tuple(message_seconds(sum(map(_elements, stage.sends))) for stage in stages.stages[:-1]),
        activation=(1,) * schedule.stages,
    )  # fmt: skip


class _Passes:
    def __init__(self, schedule: Schedule, stages: Stages, step: nn.Module, microbatch: Sequence[torch.Tensor]) -> None:
        self.schedule, self.stages, self.microbatch = schedule, stages, microbatch
        self.state = dict(step.named_parameters(remove_duplicate=False))
        self.parameters = {name: each.detach().clone().requires_grad_() for name, each in self.state.items()}
        self.handed: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}

    def seconds(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """Of F, of B or I + W, and of W of each stage, timed on the rank that has the stage while the others time
        theirs: they share caches and memory then as they do in a step. Values are handed up, gradients down."""
        if self.stages.embedded is not None:
            value = self.stages.embedded
            self.handed[value.name] = 0.02 * torch.randn(value.shape, dtype=value.dtype)
        for stage in self.stages.stages:
            with torch.no_grad():
                results = stage.module(*self._arguments(stage)[0])
            self.handed |= {value.name: each for value, each in zip(stage.sends, results, strict=False)}
        for stage in reversed(self.stages.stages):
            self._hand_back(stage)
        dist.barrier()
        me = dist.get_rank()
        own = {stage.index: self._timed(stage) for stage in self.stages.stages if self.placed(stage) == me}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        found = [gathered[self.placed(stage)][stage.index] for stage in self.stages.stages]
        forward, backward, weight = zip(*found, strict=True)
        return forward, backward, weight

    def placed(self, stage: Stage) -> int:
        return self.schedule.placement[stage.index]

    def _timed(self, stage: Stage) -> tuple[float, float, float]:
        arguments, leaves = self._arguments(stage)
        own = [argument for argument, each in zip(arguments, stage.arguments, strict=True) if each.kind == "parameter"]
        times: list[tuple[float, float, float]] = []
        for _ in range(ROUNDS + 1):
            for leaf in leaves:
                leaf.grad = None
            begin = time.perf_counter()
            outputs = self._outputs(stage, arguments)
            done = time.perf_counter()
            given = self._gradients_of(stage, outputs)
            between = halfway = time.perf_counter()
            if self.schedule.split_backward:
                if leaves:
                    torch.autograd.grad(outputs, leaves, given, retain_graph=True, allow_unused=True)
                halfway = time.perf_counter()
                if own:
                    torch.autograd.backward(outputs, given, inputs=own)
            else:
                torch.autograd.backward(outputs, given)
            end = time.perf_counter()
            del outputs
            times.append((done - begin, end - between, end - halfway))
        forward, backward, weight = (statistics.median(each) for each in zip(*times[1:], strict=True))
        return forward, backward, weight

    def _hand_back(self, stage: Stage) -> None:
        arguments, leaves = self._arguments(stage)
        if leaves:
            outputs = self._outputs(stage, arguments)
            found = torch.autograd.grad(outputs, leaves, self._gradients_of(stage, outputs), allow_unused=True)
            names = [each.name for each in stage.arguments if each.kind in ("received", "embedded")]
            self.gradients |= {name: each for name, each in zip(names, found, strict=True) if each is not None}

    def _outputs(self, stage: Stage, arguments: list[Any]) -> list[torch.Tensor]:
        """What gradients come back for; of the last stage the loss, or the rows."""
        results = stage.module(*arguments)
        return [each for each in (results[:1] if stage.index == self.schedule.last else results) if each.requires_grad]

    def _gradients_of(self, stage: Stage, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._gradient(stage, index, each) for index, each in enumerate(outputs)]

    def _gradient(self, stage: Stage, index: int, output: torch.Tensor) -> torch.Tensor:
        """What comes back for an output: from the next stage; of the loss its weight; of a sharded output layer's rows
        something of the usual size."""
        if stage.index < self.schedule.last:
            sends = [value for value in stage.sends if value.differentiable]
            return self.gradients.get(sends[index].name, torch.zeros_like(output))
        tokens = self.microbatch[0].numel() * self.schedule.microbatches
        return torch.randn_like(output) / tokens if self.stages.output is not None else torch.ones_like(output) / tokens

    def _arguments(self, stage: Stage) -> tuple[list[Any], list[torch.Tensor]]:
        """What the stage is called with, and of it what gradients come back to."""
        arguments: list[Any] = []
        leaves = []
        for each in stage.arguments:
            if each.kind == "parameter":
                arguments.append(self.parameters[each.name])
            elif each.kind == "input":
                arguments.append(self.microbatch[self.stages.input_names.index(each.name)])
            elif each.kind == "constant":
                arguments.append(self.stages.constants[each.name])
            else:
                arguments.append(self.handed[each.name].detach().requires_grad_())
                leaves.append(arguments[-1])
        return arguments, leaves

    def vocabulary(self) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...], float]:
        """(S, T) and (E, D) of each rank, and a collective of the rows."""
        head, path = self.stages.output, self.stages.output_path
        assert head is not None and path is not None and self.stages.targets is not None
        ranks, rows = self.schedule.ranks, self.stages.rows
        shard = Shard.of(dist.get_rank(), ranks, head.size)
        weight = self.parameters[path][shard.slice].detach().clone()
        layer = OutputLayer(output_cascade(self.schedule.vocabulary, head.loss.label_smoothing), weight, shard)
        with torch.no_grad():
            hidden = self.stages.stages[-1].module(*self._arguments(self.stages.stages[-1])[0])[0]
        hidden = hidden.detach().reshape(-1, rows.shape[-1])
        target = self.stages.targets(*self.microbatch).flatten()
        scale = torch.ones(len(hidden)) / len(hidden)
        total = torch.zeros_like(weight)
        started = layer.start(hidden, target, scale)
        layer.exchange(started, 0, lambda value, _: value)
        output = (
            seconds(lambda: layer.start(hidden, target, scale)),
            seconds(lambda: total.add_(layer.finish(started))),
        )
        place = (target - shard.first).clamp(0, shard.rows - 1)
        inside = (place == target - shard.first).unsqueeze(-1)
        embedding = (
            seconds(lambda: weight[place] * inside),
            seconds(lambda: total.add_(torch.zeros_like(weight).index_add_(0, place, hidden))),
        )
        message = torch.zeros(_elements(rows))
        return (output,) * ranks, (embedding,) * ranks, seconds(lambda: dist.all_reduce(message))


def _elements(value: Value) -> int:
    count = 1
    for size in value.shape:
        count *= size
    return count


def message_seconds(elements: int) -> float:
    """One way between the first two ranks."""
    tensor = torch.zeros(elements)

    def turn() -> None:
        if dist.get_rank() == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        elif dist.get_rank() == 1:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)

    return seconds(turn) / 2


class _Chain(nn.Module):
    """As little as can be cut into stages."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().sum()


def exchange_seconds(microbatches: int = 32) -> float:
    """What a rank loses around each pass that receives and sends: a pipeline of passes that compute next to nothing
    takes so much more than its simulated passes and messages. All ranks call this together."""
    ranks = dist.get_world_size()
    schedule = classic.one_forward_one_backward(ranks, microbatches)
    step = _Chain(2 * ranks)
    data = [(torch.randn(2, 4),) for _ in range(microbatches)]
    stages = cut(export_step(step, data[0]), schedule.stages)
    pipeline = PipelineRank(schedule, stages, dict(step.named_parameters()))
    measured = seconds(lambda: pipeline.step(data))
    pipeline.close()
    without = simulate(schedule, measured_costs(schedule, stages, step, data[0], 0.0)).seconds
    return max(0.0, measured - without) / (2 * (microbatches + ranks - 1))
