"""A rank of a small pipeline in which something goes wrong; each fault is one attempt in the same processes.

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
from effcc.errors import EffccError
from effcc.passes.pipeline_parallel import classic
from effcc.runtime.pipeline.executor import PipelineRank
from effcc.runtime.pipeline.stages import cut
from effcc.runtime.pipeline.step_graph import export_step
from effcc.runtime.process_group import join_group
from pipeline_worker import batch, build
from torch.distributed.device_mesh import init_device_mesh

#: Seconds that ranks wait for each other, and that a slow one takes.
LIMIT, SLOW = 3, 5
MICROBATCHES = 4


def attempt(fault: str, graph: Any, state: dict[str, torch.Tensor], replicas: int) -> None:
    """One step, in which the last rank of the pipeline (or of its second replica) is at fault."""
    rank, world = dist.get_rank(), dist.get_world_size()
    guilty = rank == world - 1
    ranks = world // replicas
    mesh = init_device_mesh("cpu", (ranks, replicas), mesh_dim_names=("pp", "dp")) if replicas > 1 else None
    make = classic.gpipe if fault == "mismatch" and guilty else classic.one_forward_one_backward
    schedule = make(ranks + (fault == "world"), MICROBATCHES)
    stages = cut(graph, schedule.stages)
    if fault == "late" and guilty:
        time.sleep(SLOW)
    pipeline = PipelineRank(schedule, stages, state, timeout=timedelta(seconds=LIMIT), mesh=mesh)
    data = batch(MICROBATCHES - 1 if fault == "few" and guilty else MICROBATCHES)
    calls = 0

    def before(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if guilty and calls == 2:  # microbatch 1
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "slow":
                time.sleep(SLOW)
            if fault == "raised":
                raise ValueError("a fault of this rank's own")

    stages.stages[schedule.last].module.register_forward_pre_hook(before)
    pipeline.step(data)
    pipeline.close()


def run(faults: list[str], replicas: int = 1) -> None:
    join_group(limit=60)
    torch.set_num_threads(1)
    step = build("plain", 3)
    graph = export_step(step, batch(1)[0])
    state = {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers(remove_duplicate=False))}
    found: dict[str, tuple[str, float]] = {}
    for fault in faults:
        begin = time.monotonic()
        try:
            attempt(fault, graph, state, replicas)
        except EffccError as error:
            found[fault] = str(error), time.monotonic() - begin
        else:
            found[fault] = "", time.monotonic() - begin
        if fault not in ("killed", "late"):  # after these the default group is of no use
            dist.barrier()
    print(json.dumps({"rank": dist.get_rank(), "found": found}), flush=True)
    os._exit(0)  # the default group cannot be left in order when a rank is gone
