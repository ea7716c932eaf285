"""Training steps whose parameters torch shards: FSDP2 for ``fsdp`` and ``dp``, DTensor's styles for ``tp``.

Nothing is sharded here. Which products are split by columns and which by rows follows from the captured graph
(``pipeline.tensor_axis``); units of FSDP are the modules of the model's lists, and the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ..errors import PipelineError
from .pipeline.step_graph import StepGraph
from .pipeline.tensor_axis import TensorAxis


class ShardedStep:
    """``step``, a module that returns the loss, sharded in place over a mesh of axes ``dp``, ``fsdp`` and ``tp``. Made
    on all ranks at once, from equal parameters.

    Raises PipelineError for a model that the styles of ``tp`` do not fit.
    """

    def __init__(self, step: torch.nn.Module, mesh: DeviceMesh, graph: StepGraph | None) -> None:
        self.module, self.mesh = step, mesh
        if mesh["tp"].size() > 1:
            assert graph is not None
            parallelize_module(step, mesh["tp"], tensor_styles(step, graph, mesh["tp"].size()))
        if mesh["fsdp"].size() * mesh["dp"].size() > 1:
            data = mesh["dp", "fsdp"] if mesh["dp"].size() > 1 else mesh["fsdp"]
            for module in list(step.modules()):
                if isinstance(module, torch.nn.ModuleList):
                    for layer in module:
                        fully_shard(layer, mesh=data)
            fully_shard(step, mesh=data)

    def step(self, microbatches: Sequence[Sequence[Any]]) -> float:
        """Gradients of the mean over all microbatches of all data ranks; that mean. Microbatches count alike."""
        total = torch.zeros((), dtype=torch.float64)
        for microbatch in microbatches:
            loss = self.module(*microbatch) / len(microbatches)
            loss.backward()
            total += loss.detach().double().cpu()
        for axis in ("dp", "fsdp"):
            if self.mesh[axis].size() > 1:
                dist.all_reduce(total, group=self.mesh[axis].get_group())
                total /= self.mesh[axis].size()
        return float(total)


def tensor_styles(step: torch.nn.Module, graph: StepGraph, parts: int) -> dict[str, ParallelStyle]:
    """Module -> how DTensor splits it."""
    axis = TensorAxis(graph, parts)
    found: dict[str, ParallelStyle] = {}
    for names, by_columns in ((axis.columns, True), (axis.rows, False)):
        for name in names:
            path = graph.parameters[name].rpartition(".")[0]
            if not isinstance(step.get_submodule(path), torch.nn.Linear):
                raise PipelineError(
                    f"torch.distributed.tensor.parallel has no style for {type(step.get_submodule(path)).__name__}",
                    where=path, remedy="tp runs models whose products are nn.Linear; plan cp, pp or fsdp for others",
                )  # fmt: skip
            if name == axis.head:
                continue  # its weight may be the table's: all ranks keep it
            found[path] = ColwiseParallel() if by_columns else RowwiseParallel(output_layouts=Replicate())
    return found
