"""One rank of a sequence that is split over devices, beside the same step in one process; called in each process."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pipeline_worker import Step, batch, build, distance, schedule_of
from torch.distributed.device_mesh import init_device_mesh


def step_of(asked: dict[str, Any]) -> Step:
    step = build(asked["model"], asked.get("layers", 2), shifted=False)
    if asked.get("attention"):
        step.model.set_attn_implementation(asked["attention"])
    return step


def main(asked: dict[str, Any]) -> dict[str, Any]:
    from effcc.context_parallel import split_sequence
    from effcc.runtime.context_parallel.exchange import SequenceGroup
    from effcc.runtime.mesh_layout import MeshLayout
    from effcc.runtime.pipeline.executor import PipelineRank
    from effcc.runtime.pipeline.stages import cut
    from effcc.runtime.pipeline.step_graph import input_head, output_head

    torch.set_num_threads(1)
    limit = timedelta(seconds=20)
    ranks, replicas, count = asked.get("pp", 1), asked.get("dp", 1), asked.get("microbatches", 2)
    parts = dist.get_world_size() // (ranks * replicas)
    mesh = init_device_mesh("cpu", (ranks, replicas, parts), mesh_dim_names=("pp", "dp", "cp"))
    layout = MeshLayout.of(mesh, "pp", RuntimeError)  # type: ignore[arg-type]
    group = SequenceGroup(layout.sequence_group(limit))
    step = step_of(asked)
    everything = batch(count * replicas)
    data = everything[layout.replica // parts * count :][:count]
    graph = split_sequence(step, data[0], parts, group=group, form=asked["form"])
    vocabulary = asked.get("vocabulary", "")
    head = output_head(graph) if vocabulary else None
    schedule = schedule_of(asked.get("schedule", "1f1b"), ranks, count, vocabulary, bool(vocabulary))
    stages = cut(graph, schedule.stages, head, input_head(graph, head.size) if head else None)
    state = {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers(remove_duplicate=False))}
    rank = PipelineRank(schedule, stages, state, timeout=limit, mesh=mesh, sequence=group)
    whole = (torch.cat([ids for ids, _ in everything]), torch.cat([labels for _, labels in everything]))
    mine, theirs = rank.parameters.named, dict(step.named_parameters())
    optimizers = [torch.optim.AdamW(list(each.values()), lr=1e-3) for each in (mine, theirs)]
    found: dict[str, Any] = {"rank": dist.get_rank(), "loss": 0.0, "gradient": 0.0}
    for _ in range(asked.get("steps", 1)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        report = rank.step(data)
        found["sent"] = group.sent
        loss = step(*whole)
        loss.backward()
        found["loss"] = max(found["loss"], abs(report.loss - float(loss.detach())) / abs(float(loss.detach())))
        for path, leaf in mine.items():
            shard = rank.parameters.sharded.get(path)
            wanted = theirs[path].grad
            assert wanted is not None
            apart = distance(leaf.grad, wanted if shard is None else wanted[shard.slice])
            found["gradient"] = max(found["gradient"], apart)
        for optimizer in optimizers:
            optimizer.step()
    found["apart"] = max(
        distance(leaf, theirs[path] if path not in rank.parameters.sharded else
                 theirs[path][rank.parameters.sharded[path].slice])
        for path, leaf in mine.items()
    )  # fmt: skip
    dist.barrier()
    rank.close()
    return found


def run(asked: dict[str, Any]) -> None:
    """Print what the rank found as a line of JSON."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    print(json.dumps(main(asked)))
    dist.destroy_process_group()
