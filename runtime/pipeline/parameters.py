"""The parameters that one rank of a pipeline holds: its stages', and its rows of the sharded vocabulary matrices.

A parameter that several stages use (tied embeddings) is one leaf on a rank; where it lies on several ranks, each has
one, and their gradients are added up after each step (``gradients``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import PipelineError
from ...passes.pipeline_parallel.schedule import Schedule
from .output_layer import Shard
from .stages import Argument, Stages


class RankParameters:
    """``model_state``: parameters, buffers and tied names by path; equal tensors (the same object) are one parameter.
    ``named``: path -> the leaf on this rank, sharded ones by the path of the whole."""

    def __init__(self, schedule: Schedule, stages: Stages, model_state: Mapping[str, torch.Tensor], rank: int) -> None:
        self._state, self._stages = model_state, stages
        first_name: dict[int, str] = {}
        for name, tensor in model_state.items():
            first_name.setdefault(id(tensor), name)
        self._canonical = {name: first_name[id(tensor)] for name, tensor in model_state.items()}
        self.named: dict[str, torch.Tensor] = {}
        self.sharded: dict[str, Shard] = {}
        for head, matrix in ((stages.output, stages.output_path), (stages.input, stages.input_path)):
            if head is not None and matrix is not None:
                shard = Shard.of(rank, schedule.ranks, head.size)
                path = self._path(matrix)
                self.sharded[path] = shard
                if path not in self.named:  # tied: one shard for both
                    self.named[path] = self._tensor(matrix)[shard.slice].detach().clone().requires_grad_()
        self._by_stage: dict[int, list[str]] = {}
        self._owners: dict[str, set[int]] = {}
        for stage in stages.stages:
            paths = [self._path(argument.name) for argument in stage.arguments if argument.kind == "parameter"]
            for path in paths:
                if path in self.sharded:
                    raise PipelineError(
                        f"{path} is sharded over the ranks, and stage {stage.index} reads all of it",
                        remedy="shard both the input embedding and the output layer where they are tied",
                    )
                self._owners.setdefault(path, set()).add(schedule.placement[stage.index])
                if schedule.placement[stage.index] == rank and path not in self.named:
                    self.named[path] = self._tensor(path).detach().clone().requires_grad_()
            if schedule.placement[stage.index] == rank:
                self._by_stage[stage.index] = list(dict.fromkeys(paths))

    def value(self, argument: Argument) -> torch.Tensor:
        """What a stage's module is called with."""
        if argument.kind == "parameter":
            return self.named[self._path(argument.name)]
        if argument.kind == "constant":
            return self._stages.constants[argument.name]
        return self._tensor(argument.name)

    def of_stage(self, stage: int) -> list[torch.Tensor]:
        leaves = [self.named[path] for path in self._by_stage[stage]]
        return [leaf for leaf in leaves if leaf.requires_grad]

    def paths_of_stage(self, stage: int) -> list[str]:
        return self._by_stage[stage]

    def shared_paths(self) -> dict[str, list[int]]:
        """Parameters that lie on several ranks of a pipeline, with these ranks."""
        return {path: sorted(ranks) for path, ranks in sorted(self._owners.items()) if len(ranks) > 1}

    @property
    def output_paths(self) -> list[str]:
        """The sharded output matrix, if there is one."""
        return [] if self._stages.output_path is None else [self._path(self._stages.output_path)]

    @property
    def input_paths(self) -> list[str]:
        return [] if self._stages.input_path is None else [self._path(self._stages.input_path)]

    def output_shard(self) -> torch.Tensor:
        assert self._stages.output_path is not None
        return self.named[self._path(self._stages.output_path)]

    def input_shard(self) -> torch.Tensor:
        assert self._stages.input_path is not None
        return self.named[self._path(self._stages.input_path)]

    @staticmethod
    def add_gradient(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            parameter.grad += gradient

    def _path(self, name: str) -> str:
        return self._canonical.get(name, name)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._state:
            raise PipelineError(f"the model's state has no {name}", remedy="give parameters and buffers by their paths")
        return self._state[name]
