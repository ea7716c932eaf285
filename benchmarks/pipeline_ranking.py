"""Plans of one model ranked by prediction and by measurement, over gloo on this machine.

Costs are measured (``pipeline_costs``: every pass of every stage in one process, messages, an all-reduce, and what a
pass costs besides) and simulated; then each plan runs in as many processes as it has ranks. What counts is Spearman's
rank correlation.

    python benchmarks/pipeline_ranking.py [--ranks 2] [--rounds 7] [--keep]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy
import torch
import torch.distributed as dist
from effcc.passes.pipeline_parallel.schedule import Schedule
from effcc.passes.pipeline_parallel.simulate import simulate
from effcc.runtime.pipeline.executor import PipelineRank
from effcc.runtime.pipeline.plan import make_schedule
from effcc.runtime.pipeline.stages import Stages, cut
from effcc.runtime.pipeline.step_graph import export_step, input_head, output_head
from pipeline_costs import exchange_seconds, measured_costs, seconds
from pipeline_worker import Plain, Step
from subprocesses import rank_variables, results, start

#: Output layer and layers stand to each other about as in GPT-2.
ROWS, LENGTH, VOCABULARY, LAYERS, WIDTH, INNER = 32, 64, 6000, 8, 256, 1024
PLANS = [
    *itertools.product(("gpipe", "1f1b", "zb-h1", "interleaved", "zb-v", "v-half"), ("",), (4, 8, 16)),
    *itertools.product(("1f1b", "v-half"), ("one-barrier", "two-barriers"), (4, 8, 16)),
]


def make(name: str, kind: str, microbatches: int, ranks: int) -> tuple[Schedule, Stages, Step, list[Any]]:
    torch.manual_seed(0)
    step = Step(Plain(LAYERS, VOCABULARY, WIDTH, INNER), shifted=False)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    data = [(part, part) for part in ids.chunk(microbatches)]
    schedule = make_schedule(name, ranks, microbatches, kind)
    graph = export_step(step, data[0])
    head = output_head(graph) if kind else None
    return schedule, cut(graph, schedule.stages, head, input_head(graph, head.size) if head else None), step, data


def worker(rounds: int, plans: list[tuple[str, str, int]]) -> None:
    """One rank: all plans one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    rows = []
    exchange = exchange_seconds()
    for name, kind, microbatches in plans:
        schedule, stages, step, data = make(name, kind, microbatches, ranks)
        predicted = simulate(schedule, measured_costs(schedule, stages, step, data[0], exchange)).seconds
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
