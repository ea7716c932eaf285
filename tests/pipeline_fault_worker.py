"""A rank in whose step something goes wrong: of a pipeline, of a sequence that ranks share, of one that torch shards.
Each fault is one attempt in the same processes.

Prints a line of JSON: fault -> message that the attempt ended with, and the seconds that it took.
"""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from effcc.context_parallel import split_sequence
from effcc.errors import EffccError, PipelineError
from effcc.passes.pipeline_parallel import classic
from effcc.runtime.context_parallel.exchange import SequenceGroup
from effcc.runtime.mesh_layout import MeshLayout, timed_mesh
from effcc.runtime.pipeline.executor import PipelineRank
from effcc.runtime.pipeline.stages import cut
from effcc.runtime.pipeline.step_graph import export_step
from effcc.runtime.process_group import join_group
from effcc.runtime.torch_sharding import ShardedStep
from pipeline_worker import batch, build
from torch.distributed.device_mesh import init_device_mesh

#: Seconds that ranks wait for each other, and that a slow one takes.
LIMIT, SLOW = 3, 5
MICROBATCHES = 4
AXES = ("dp", "fsdp", "tp")


class Striker:
    """Does a fault when its second ``strike`` comes."""

    def __init__(self, fault: str, guilty: bool) -> None:
        self.fault, self.guilty, self.calls = fault, guilty, 0

    def strike(self, *_: Any) -> None:
        self.calls += 1
        if not self.guilty or self.calls != 2:
            return
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "slow":
            time.sleep(SLOW)
        if self.fault == "raised":
            raise ValueError("a fault of this rank's own")


def pipeline(fault: str, guilty: bool, replicas: int) -> None:
    """One step, in which the last rank of the pipeline (or of its second replica) is at fault at microbatch 1."""
    ranks = dist.get_world_size() // replicas
    mesh = init_device_mesh("cpu", (ranks, replicas), mesh_dim_names=("pp", "dp")) if replicas > 1 else None
    step = build("plain", 3)
    make = classic.gpipe if fault == "mismatch" and guilty else classic.one_forward_one_backward
    schedule = make(ranks + (fault == "world"), MICROBATCHES)
    stages = cut(export_step(step, batch(1)[0]), schedule.stages)
    if fault == "late" and guilty:
        time.sleep(SLOW)
    rank = PipelineRank(schedule, stages, state_of(step), timeout=timedelta(seconds=LIMIT), mesh=mesh)
    stages.stages[schedule.last].module.register_forward_pre_hook(Striker(fault, guilty).strike)
    rank.step(batch(MICROBATCHES - 1 if fault == "few" and guilty else MICROBATCHES))
    rank.close()


def sequence(fault: str, guilty: bool, form: str) -> None:
    """One step of a sequence that all ranks share, in which the last one is at fault in the middle of an attention."""
    ranks, limit = dist.get_world_size(), timedelta(seconds=LIMIT)
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("pp", "cp"))
    group = SequenceGroup(MeshLayout.of(mesh, "pp", PipelineError).sequence_group(limit))
    step = build("gpt2", 2 - (fault == "mismatch" and guilty), shifted=False)
    ids = torch.zeros(2, 2 * ranks, dtype=torch.long)
    graph = split_sequence(step, (ids, ids), ranks, group=group, form=form)
    schedule = classic.one_forward_one_backward(1, 1)
    exchange = "pass_on" if form == "ring" else "all_reduce"
    striker, inner = Striker(fault, guilty), getattr(group, exchange)

    def struck(*arguments: Any) -> Any:
        striker.strike()
        return inner(*arguments)

    setattr(group, exchange, struck)
    rank = PipelineRank(schedule, cut(graph, 1), state_of(step), timeout=limit, mesh=mesh, sequence=group)
    rank.step([(ids, ids)])
    rank.close()


def sharded(fault: str, guilty: bool, axis: str) -> None:
    """One step of parameters that torch shards, in which the last rank is at fault in the second layer's forward, or at
    the head's gradient where the fault says so."""
    limit, world = timedelta(seconds=LIMIT), dist.get_world_size()
    mesh = timed_mesh("cpu", [world if name == axis else 1 for name in AXES], AXES, limit)
    step = build("plain", 3 - (fault == "mismatch" and guilty), vocabulary=54)
    data = batch(MICROBATCHES)
    graph = export_step(step, data[0]) if axis == "tp" else None
    striker = Striker(fault.removesuffix(" backward"), guilty)
    whole = ShardedStep(step, mesh, graph, limit)
    layer = step.model.layers[1]
    if fault.endswith("backward"):
        layer.register_forward_hook(lambda _module, _inputs, output: output.register_hook(striker.strike) and None)
    else:
        layer.register_forward_pre_hook(striker.strike)
    whole.step(data)
    whole.watch.close()


def state_of(step: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers(remove_duplicate=False))}


def run(faults: list[str], what: str = "pipeline", how: Any = 1) -> None:
    join_group(limit=60)
    torch.set_num_threads(1)
    attempt = {"pipeline": pipeline, "sequence": sequence, "sharded": sharded}[what]
    guilty = dist.get_rank() == dist.get_world_size() - 1
    found: dict[str, tuple[str, float]] = {}
    for fault in faults:
        begin = time.monotonic()
        try:
            attempt(fault, guilty, how)
        except EffccError as error:
            found[fault] = str(error), time.monotonic() - begin
        else:
            found[fault] = "", time.monotonic() - begin
        if fault not in ("killed", "late"):  # after these the default group is of no use
            dist.barrier()
    print(json.dumps({"rank": dist.get_rank(), "found": found}), flush=True)
    os._exit(0)  # the default group cannot be left in order when a rank is gone
