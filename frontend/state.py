"""Bytes that live as long as training does: parameters, gradients, optimizer state and buffers.

Optimizer state is counted as ``torch.optim`` allocates it (default, non-fused settings): tensors of the parameter's
dtype, and a float32 step count of one element for each parameter where the optimizer keeps one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..errors import OptionError

_STEP_BYTES = 4
#: bitsandbytes' block-wise state: one float32 scale for 256 elements; small tensors stay float32.
_BLOCK, _SMALL = 256, 4096


def _copies(count: int, *, step: bool) -> Callable[[torch.Size, int], int]:
    return lambda shape, element: count * prod(shape) * element + (_STEP_BYTES if step else 0)


def _adafactor(shape: torch.Size, element: int) -> int:
    if len(shape) < 2:
        return prod(shape) * element + _STEP_BYTES
    rows, columns = prod(shape[:-1]), prod(shape[:-2]) * shape[-1]
    return (rows + columns) * element + _STEP_BYTES


def _muon(shape: torch.Size, element: int) -> int:
    """Momentum for matrices; what is no matrix is left to AdamW, as Muon's authors do."""
    return prod(shape) * element if len(shape) == 2 else _copies(2, step=True)(shape, element)


def _eight_bit(shape: torch.Size, element: int) -> int:
    count = prod(shape)
    if count < _SMALL:
        return 2 * 4 * count
    return 2 * (count + 4 * -(-count // _BLOCK))


#: Name -> bytes of state for a parameter, from its shape and bytes per element.
OPTIMIZERS: dict[str, Callable[[torch.Size, int], int]] = {
    "none": _copies(0, step=False),
    "sgd": _copies(0, step=False),
    "sgd_momentum": _copies(1, step=False),
    "adam": _copies(2, step=True),
    "adamw": _copies(2, step=True),
    "adamw_amsgrad": _copies(3, step=True),
    "nadam": lambda shape, element: _copies(2, step=True)(shape, element) + _STEP_BYTES,
    "adamax": _copies(2, step=True),
    "adagrad": _copies(1, step=True),
    "adadelta": _copies(2, step=True),
    "rmsprop": _copies(1, step=True),
    "adafactor": _adafactor,
    "lion": _copies(1, step=False),
    "muon": _muon,
    "adamw_8bit": _eight_bit,
}


@dataclass(frozen=True)
class StateEntry:
    """One tensor's share. ``kind``: parameter, gradient, optimizer, master or buffer. ``name`` is the tensor's path."""

    kind: str
    name: str
    bytes: int
    module: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StateBytes:
    entries: tuple[StateEntry, ...]

    def of_kind(self, kind: str) -> int:
        return sum(entry.bytes for entry in self.entries if entry.kind == kind)

    @property
    def parameters(self) -> int:
        return self.of_kind("parameter")

    @property
    def gradients(self) -> int:
        return self.of_kind("gradient")

    @property
    def optimizer(self) -> int:
        return self.of_kind("optimizer") + self.of_kind("master")

    @property
    def buffers(self) -> int:
        return self.of_kind("buffer")

    @property
    def total(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    def by_module(self, depth: int = 2) -> dict[str, int]:
        """Bytes below each module path cut to ``depth`` names; numbers in a path are kept."""
        table: dict[str, int] = {}
        for entry in self.entries:
            key = ".".join(entry.module.split(".")[:depth])
            table[key] = table.get(key, 0) + entry.bytes
        return table


def optimizer_name(optimizer: Any) -> str:
    """The key of ``OPTIMIZERS`` for a name, a torch.optim class or instance, or a function that makes one.
    Raises OptionError for what is not known."""
    if optimizer is None:
        return "none"
    if isinstance(optimizer, str):
        name = optimizer.lower().replace("-", "_")
    else:
        if not isinstance(optimizer, type) and callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
        name = (optimizer if isinstance(optimizer, type) else type(optimizer)).__name__.lower()
        defaults = getattr(optimizer, "defaults", {})
        if name == "sgd" and defaults.get("momentum"):
            name = "sgd_momentum"
        if name == "adamw" and defaults.get("amsgrad"):
            name = "adamw_amsgrad"
    if name not in OPTIMIZERS:
        raise OptionError(f"optimizer {name!r} is not known", remedy=f"Known: {', '.join(sorted(OPTIMIZERS))}.")
    return name


def model_state(
    model: torch.nn.Module, *, train: bool, optimizer: Any = None, master_weights: bool = False
) -> StateBytes:
    """Count a model's state; nothing is read but shapes and dtypes. A tensor used in several places counts once.

    train: also gradients (of parameters that require them) and the optimizer's state.
    master_weights: a float32 copy of each trained parameter of a smaller dtype; the optimizer's state is then float32.
    """
    state = OPTIMIZERS[optimizer_name(optimizer)]
    return StateBytes(tuple(_entries(model, train, state, master_weights)))


def _entries(
    model: torch.nn.Module, train: bool, state: Callable[[torch.Size, int], int], master_weights: bool
) -> Iterator[StateEntry]:
    def entry(kind: str, name: str, size: int, tensor: torch.Tensor) -> StateEntry:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return StateEntry(kind, name, size, name.rpartition(".")[0], dtype, tuple(tensor.shape))

    for name, parameter in model.named_parameters():
        yield entry("parameter", name, _bytes(parameter), parameter)
        if not (train and parameter.requires_grad):
            continue
        yield entry("gradient", name, _bytes(parameter), parameter)
        element = parameter.element_size()
        if master_weights and element < 4:
            yield entry("master", name, 4 * parameter.numel(), parameter)
            element = 4
        if size := state(parameter.shape, element):
            yield entry("optimizer", name, size, parameter)
    for name, buffer in model.named_buffers():
        yield entry("buffer", name, _bytes(buffer), buffer)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
