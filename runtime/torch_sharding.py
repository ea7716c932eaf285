"""Training steps whose parameters torch shards: FSDP2 for ``fsdp`` and ``dp``, DTensor's styles for ``tp``.

Nothing is sharded here. Which products are split by columns and which by rows follows from the captured graph
(``pipeline.tensor_axis``); units of FSDP are the modules of the model's lists, and the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils import _pytree as pytree

from ..errors import PipelineError
from .pipeline.step_graph import StepGraph
from .pipeline.tensor_axis import TensorAxis
from .rank_watch import RankWatch


class ShardedStep:
    """``step``, a module that returns the loss, sharded in place over a mesh of axes ``dp``, ``fsdp`` and ``tp``. Made
    on all ranks at once, from equal parameters. ``timeout``: after which a rank that does not answer ends the others,
    which then name it; the mesh's groups must not wait longer (``mesh_layout.timed_mesh``).

    Raises PipelineError for a model that the styles of ``tp`` do not fit, and where ranks have different models.
    """

    def __init__(
        self,
        step: torch.nn.Module,
        mesh: DeviceMesh,
        graph: StepGraph | None,
        timeout: timedelta = timedelta(seconds=300),
    ) -> None:
        self.module, self.mesh, self.microbatch = step, mesh, ""
        self.watch = RankWatch(
            timeout.total_seconds(), PipelineError,
            "see that rank's own output, and start the step again from the last checkpoint; ShardedStep has a timeout",
            alike=True,
        )  # fmt: skip
        remedy = "give all ranks the same plan and build the same model"
        self.watch.check_equal("the plan or model", _digest(step, mesh), remedy)
        with self.watch.explaining():
            self.watch.doing("sharding the model")
            self._shard(graph)
        for path, module in step.named_modules():
            if path:
                self._tell(path, module)

    def _shard(self, graph: StepGraph | None) -> None:
        step, mesh = self.module, self.mesh
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

    def _tell(self, path: str, module: torch.nn.Module) -> None:
        """Say where this rank is before each module's forward and backward, before what torch gathers for them."""

        def forward(*_: Any) -> None:
            self.watch.doing(f"the forward of {path}{self.microbatch}")

        def backward(_: Any) -> None:
            self.watch.doing(f"the backward of {path}{self.microbatch}")

        def outputs(_module: Any, _arguments: Any, output: Any) -> None:
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(backward)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(forward, prepend=True)
        module.register_forward_hook(outputs, prepend=True)

    def step(self, microbatches: Sequence[Sequence[Any]]) -> float:
        """Gradients of the mean over all microbatches of all data ranks; that mean. Microbatches count alike. Raises
        PipelineError naming rank and step."""
        try:
            with self.watch.explaining():
                return self._step(microbatches)
        except PipelineError:
            self.watch.close()
            raise

    def _step(self, microbatches: Sequence[Sequence[Any]]) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for number, microbatch in enumerate(microbatches):
            self.microbatch = f", microbatch {number}"
            self.watch.doing(f"the begin of microbatch {number}")
            loss = self.module(*microbatch) / len(microbatches)
            self.watch.doing(f"the loss of microbatch {number}")
            loss.backward()
            total += loss.detach().double().cpu()
        self.watch.doing("the end of the step")
        for axis in ("dp", "fsdp"):
            if self.mesh[axis].size() > 1:
                dist.all_reduce(total, group=self.mesh[axis].get_group())
                total /= self.mesh[axis].size()
        return float(total)


def _digest(step: torch.nn.Module, mesh: DeviceMesh) -> bytes:
    """32 bytes that differ where ranks would not agree on what is sharded how."""
    parameters = [(path, tuple(each.shape), str(each.dtype)) for path, each in step.named_parameters()]
    return hashlib.sha256(repr((tuple(mesh.shape), mesh.mesh_dim_names, parameters)).encode()).digest()


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
