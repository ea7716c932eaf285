"""Plans of one model ranked by prediction and by measurement, over gloo on this machine.

Costs are measured in one process (every pass of every stage, a message, an all-reduce) and simulated; then each plan
runs in as many processes as it has ranks. What counts is Spearman's rank correlation.

    python benchmarks/pipeline_ranking.py [--ranks 2] [--rounds 7] [--keep]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy
import torch
import torch.distributed as dist
from effcc.passes.pipeline_parallel.costs import PipelineCosts
from effcc.passes.pipeline_parallel.schedule import Schedule
from effcc.passes.pipeline_parallel.simulate import simulate
from effcc.passes.pipeline_parallel.vocabulary_cascade import output_cascade
from effcc.runtime.monoid_state import local_state
from effcc.runtime.pipeline.executor import PipelineRank
from effcc.runtime.pipeline.output_layer import OutputLayer, Shard
from effcc.runtime.pipeline.plan import make_schedule
from effcc.runtime.pipeline.stages import Stages, cut
from effcc.runtime.pipeline.step_graph import export_step, input_head, output_head
from pipeline_worker import Plain, Step
from subprocesses import rank_variables, results, start

ROWS, LENGTH, VOCABULARY, LAYERS, WIDTH = 32, 64, 6000, 8, 256
PLANS = [
    *itertools.product(("gpipe", "1f1b", "zb-h1", "interleaved", "zb-v", "v-half"), ("",), (4, 8, 16)),
    *itertools.product(("1f1b", "v-half"), ("one-barrier", "two-barriers"), (4, 8, 16)),
]


def seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """Median time of a call."""
    run()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def make(name: str, kind: str, microbatches: int, ranks: int) -> tuple[Schedule, Stages, Step, list[Any]]:
    torch.manual_seed(0)
    step = Step(Plain(LAYERS, VOCABULARY, WIDTH), shifted=False)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    data = [(part, part) for part in ids.chunk(microbatches)]
    schedule = make_schedule(name, ranks, microbatches, kind)
    graph = export_step(step, data[0])
    head = output_head(graph) if kind else None
    return schedule, cut(graph, schedule.stages, head, input_head(graph, head.size) if head else None), step, data


def measured_costs(schedule: Schedule, stages: Stages, step: Step, data: list[Any], ranks: int) -> PipelineCosts:
    """Every pass of one microbatch, timed in this process alone, on the values that the stages hand on: numbers of
    another size may overflow or lose their normal form on the way, which takes many times as long."""
    state = dict(step.named_parameters(remove_duplicate=False))
    forward, backward, inputs, weight = [], [], [], []
    handed: dict[str, torch.Tensor] = {}
    for stage in stages.stages:
        arguments: list[Any] = []
        for argument in stage.arguments:
            if argument.kind == "parameter":
                arguments.append(state[argument.name].detach().requires_grad_())
            elif argument.kind == "input":
                arguments.append(data[0][stages.input_names.index(argument.name)])
            elif argument.kind == "constant":
                arguments.append(stages.constants[argument.name])
            else:
                values = [*stage.receives, *([stages.embedded] if stages.embedded else [])]
                value = next(each for each in values if each.name == argument.name)
                known = handed.get(argument.name)
                if known is None:
                    known = 0.02 * torch.randn(value.shape)
                arguments.append(known.to(value.dtype).detach().requires_grad_())
        with torch.no_grad():
            handed |= {value.name: each for value, each in zip(stage.sends, stage.module(*arguments), strict=False)}
        leaves = [a for a, b in zip(arguments, stage.arguments, strict=True) if b.kind in ("received", "embedded")]
        parameters = [a for a, b in zip(arguments, stage.arguments, strict=True) if b.kind == "parameter"]

        def run(stage: Any = stage, arguments: list[Any] = arguments) -> list[torch.Tensor]:
            return [each for each in stage.module(*arguments) if each.requires_grad]

        def back(targets: list[torch.Tensor], run: Any = run) -> None:
            outputs = run()
            gradients = [torch.full_like(each, 1e-3) for each in outputs]
            if targets:
                torch.autograd.grad(outputs, targets, gradients, allow_unused=True)

        forward.append(seconds(run))
        backward.append(max(0.0, seconds(lambda: back([*leaves, *parameters])) - forward[-1]))  # noqa: B023
        inputs.append(max(0.0, seconds(lambda: back(leaves)) - forward[-1]) if leaves else 0.0)  # noqa: B023
        weight.append(max(0.0, seconds(lambda: back(parameters)) - forward[-1]) if parameters else 0.0)  # noqa: B023
    if schedule.split_backward:
        backward = [a + b for a, b in zip(inputs, weight, strict=True)]
    output: tuple[tuple[float, float], ...] = ()
    embedding: tuple[tuple[float, float], ...] = ()
    tensor = torch.randn(stages.rows.shape)
    if stages.output is not None:
        shard = Shard.of(0, ranks, VOCABULARY)
        layer = OutputLayer(output_cascade(schedule.vocabulary), torch.randn(shard.rows, WIDTH), shard)
        rows = tensor.reshape(-1, WIDTH)
        target = data[0][1].flatten()
        scale = torch.ones(len(rows))
        started = layer.start(rows, target, scale)
        first = seconds(lambda: layer.start(rows, target, scale))
        layer.exchange(started, 0, lambda value, _: value)
        second = seconds(lambda: layer.finish(started))
        assert local_state(layer.cascade.meetings[0], started.values)
        output, embedding = ((first, second),) * ranks, ((first / 50, first / 50),) * ranks
    message, collective = torch.zeros(tensor.numel()), torch.zeros(tensor.numel())
    return PipelineCosts(
        forward=tuple(forward), backward=tuple(backward), weight=tuple(weight), output=output,
        embedding=embedding if schedule.embedding else (), transfer=_message(message) / 2,
        collective=seconds(lambda: dist.all_reduce(collective)), activation=(1,) * schedule.stages,
    )  # fmt: skip


def _message(tensor: torch.Tensor) -> float:
    """There and back between the first two ranks."""

    def turn() -> None:
        if dist.get_rank() == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        elif dist.get_rank() == 1:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)

    return seconds(turn)


def worker(rounds: int, plans: list[tuple[str, str, int]]) -> None:
    """One rank: all plans one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    rows = []
    for name, kind, microbatches in plans:
        schedule, stages, step, data = make(name, kind, microbatches, ranks)
        predicted = simulate(schedule, measured_costs(schedule, stages, step, data, ranks)).seconds
        state = {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers())}
        pipeline = PipelineRank(schedule, stages, state)

        def once(pipeline: PipelineRank = pipeline, data: list[Any] = data) -> None:
            dist.barrier()
            pipeline.step(data)
            dist.barrier()

        measured = seconds(once, rounds)
        pipeline.close()
        rows.append(
            {"plan": f"{name} {kind} m={microbatches}", "predicted_ms": predicted * 1e3, "measured_ms": measured * 1e3}
        )
    print(json.dumps({"rows": rows}))
    dist.destroy_process_group()


def spearman(rows: list[dict[str, Any]]) -> float:
    places = [numpy.argsort(numpy.argsort([row[key] for row in rows])) for key in ("predicted_ms", "measured_ms")]
    return float(numpy.corrcoef(*places)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plans", type=int, default=len(PLANS), help="only the first so many")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/pipeline_ranking.json")
    asked = parser.parse_args()
    plans = [plan for plan in PLANS if plan[0] != "interleaved" or plan[2] % asked.ranks == 0][: asked.plans]
    about = common.environment()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import pipeline_ranking as p; p.worker({asked.rounds}, {plans!r})"  # noqa: E501
    processes = [
        start(code, Path(tempfile.gettempdir()) / "effcc-pipeline-ranking", each)
        for each in rank_variables(asked.ranks)
    ]
    rows = results(processes, 3600)[0]["rows"]
    common.show("Plans, predicted and measured", rows)
    print(f"Spearman {spearman(rows):.3f} over {len(rows)} plans", file=sys.stderr)
    if asked.keep:
        common.keep("pipeline_ranking", rows, about | {"spearman": spearman(rows)})


if __name__ == "__main__":
    main()
