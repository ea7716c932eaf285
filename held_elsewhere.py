"""What a training process holds besides the graph that is being compiled: optimizer state, and its other graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cost_model.devices import Device
from .cost_model.optimizers import optimizer_workspace
from .errors import OptionError
from .frontend.state import OPTIMIZERS, optimizer_name


@dataclass(frozen=True)
class Elsewhere:
    """Bytes held during the whole step: ``optimizer`` state (made or to be made), ``parameters`` that the graph does
    not take, with their gradients, and what ``other_graphs`` save. ``optimizer_step``: the most that is held while the
    optimizer runs, when nothing of the graph is left."""

    optimizer: int = 0
    parameters: int = 0
    other_graphs: int = 0
    optimizer_step: int = 0

    @property
    def bytes(self) -> int:
        return self.optimizer + self.parameters + self.other_graphs

    @property
    def words(self) -> str:
        from .formatting import bytes_text

        named = {
            "optimizer state": self.optimizer,
            "parameters of other graphs": self.parameters,
            "values saved by other graphs": self.other_graphs,
        }
        return ", ".join(f"{name} {bytes_text(size)}" for name, size in named.items() if size)


@dataclass
class _Graph:
    parameters: list[weakref.ref[torch.Tensor]]
    saved_bytes: int


#: Training graphs compiled under a budget in this process, by the identities of their parameters.
_graphs: dict[frozenset[int], _Graph] = {}


def real_inputs(gm: torch.fx.GraphModule) -> list[Any]:
    """What Dynamo was called with, for each input of its graph, as far as it is known."""
    return [getattr(node.meta.get("grapharg"), "example", None) for node in gm.graph.find_nodes(op="placeholder")]


def held_elsewhere(inputs: Sequence[Any], device: Device) -> Elsewhere:
    """What the process holds besides a graph with these real inputs."""
    mine = {id(value): value for value in inputs if isinstance(value, torch.nn.Parameter)}
    if not mine:
        return Elsewhere()
    state = workspace = 0
    others: dict[int, torch.Tensor] = {}
    for optimizer in _optimizers_of(mine):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state += _state_bytes(optimizer, parameters)
        workspace += optimizer_workspace(type(optimizer).__name__, [p.nbytes for p in parameters], device)
        others.update({id(p): p for p in parameters if id(p) not in mine})
    saved = 0
    if any(key != frozenset(mine) for key in _graphs):
        gc.collect()  # models that nobody has any more, but for circles, go now
    for key, graph in list(_graphs.items()):
        alive = [parameter() for parameter in graph.parameters]
        if not any(p is not None for p in alive):
            del _graphs[key]
        elif key != frozenset(mine):
            saved += graph.saved_bytes
            others.update({id(p): p for p in alive if p is not None and id(p) not in mine})
    elsewhere = sum(p.nbytes * (2 if p.requires_grad else 1) for p in others.values())
    own = sum(p.nbytes * (2 if p.requires_grad else 1) for p in mine.values())
    total = own + elsewhere + state + workspace if workspace or state else 0
    return Elsewhere(state, elsewhere, saved, total)


def note_graph(inputs: Sequence[Any], saved_bytes: int) -> None:
    """Remember what a compiled graph saves, for the graphs that are compiled after it."""
    parameters = [value for value in inputs if isinstance(value, torch.nn.Parameter)]
    if parameters:
        _graphs[frozenset(map(id, parameters))] = _Graph([weakref.ref(p) for p in parameters], saved_bytes)


def _optimizers_of(parameters: Iterable[int]) -> list[torch.optim.Optimizer]:
    wanted = set(parameters)
    found = [item for item in gc.get_objects() if issubclass(type(item), torch.optim.Optimizer)]
    return [
        optimizer
        for optimizer in found
        if any(id(p) in wanted for group in getattr(optimizer, "param_groups", ()) for p in group["params"])
    ]


def _state_bytes(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> int:
    """Bytes of the state that is there; of what the first step will make, for the optimizers that are known."""
    try:
        expected = OPTIMIZERS[optimizer_name(optimizer)]
    except OptionError:
        expected = OPTIMIZERS["none"]
    total = 0
    for parameter in parameters:
        entry = optimizer.state.get(parameter)
        if entry:
            total += sum(value.nbytes for value in entry.values() if isinstance(value, torch.Tensor))
        elif parameter.requires_grad:
            total += expected(parameter.shape, parameter.element_size())
    return total
