"""Which tensors of a model and its optimizer get a home, and that the disk has room for them."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import TrainStepError
from . import optimizers
from .away import homes
from .residency import Residency
from .saved import SMALLEST
from .stores import Store


def adoptable(value: torch.Tensor, residency: Residency) -> bool:
    """Whether ``value`` fills a storage of its own that is worth sending away."""
    if value.is_meta or value.layout != torch.strided or value.device.type != residency.store.device.type:
        return False
    storage = value.untyped_storage()
    return storage.nbytes() == value.nbytes >= SMALLEST and storage.resizable()


def adopt_parameters(residency: Residency | None, model: nn.Module) -> None:
    """Give a home to the parameters that have none yet. Raises TrainStepError for two that share memory."""
    if residency is not None:
        residency.look_again()
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        home = homes.get(id(parameter))
        if home is not None and home.residency is not residency:
            # Another training step of the same model has had it.
            home.residency.bring_in(home)
            home.residency.forget(home)
            home = None
        if home is not None or residency is None or parameter.is_meta:
            continue
        if not parameter.untyped_storage().resizable():
            parameter.data = parameter.data.clone()  # it lies in a mapped file, or in numpy's memory
        first = owners.setdefault(parameter.untyped_storage().data_ptr(), name)
        if first != name and parameter.numel():
            raise TrainStepError(
                f"the parameters {first} and {name} share memory, and are not the same parameter",
                where=name,
                remedy="Tie them as one parameter (b.weight = a.weight), or give each memory of its own.",
            )
        adopt_parameter(residency, parameter, name)


def adopt_parameter(residency: Residency, parameter: torch.Tensor, name: str) -> None:
    if type(parameter) is nn.Parameter and adoptable(parameter, residency):
        residency.adopt(parameter, name)


def adopt_state(residency: Residency, optimizer: torch.optim.Optimizer, parameter: torch.Tensor, name: str) -> None:
    """Give a home to what the optimizer keeps for ``parameter``."""
    entry = optimizer.state.get(parameter, {})
    for key, value in entry.items():
        if type(value) is not torch.Tensor or id(value) in homes:
            continue
        if not value.untyped_storage().resizable():
            entry[key] = value = value.clone()
        if adoptable(value, residency):
            residency.adopt(value, f"{key} of {name}")


def reserve_state(store: Store, optimizer: torch.optim.Optimizer) -> None:
    """Ask for the room that the optimizer's state will need, so that a full disk is an error now. Raises SwapError."""
    known: dict[tuple[int, torch.Size, torch.dtype], list[int]] = {}
    places = []
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter in optimizer.state or not parameter.requires_grad:
                continue
            key = (index, parameter.shape, parameter.dtype)
            if key not in known:
                known[key] = optimizers.state_bytes(optimizer, group, parameter)
            places += [store.reserve(size) for size in known[key] if size >= SMALLEST]
    for place in places:
        store.release(place)
