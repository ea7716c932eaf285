"""The peak of a graph's first run, by the allocator's own record.

What a graph cannot see is not counted, except what it is given: inputs of the forward are held until the backward ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import torch_internals


class PeakMeter:
    """Shared by the graphs of one step."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.lock = threading.Lock()

    def run(self, function: Callable[[list[Any]], Any], args: list[Any]) -> tuple[Any, int | None]:
        """``function(args)``, and the most bytes held meanwhile: the step's inputs and what the run allocates. None
        where something else records the allocator, or the run is not the highest that the device has seen."""
        with self.lock:
            self.held.update(storages(args))
            held = sum(self.held.values())
        if any(isinstance(value, torch.Tensor) and value.device.type == "cuda" for value in args):
            return run_on_cuda(function, args, held)
        result, growth = torch_internals.peak_growth(lambda: function(args))
        return result, None if growth is None else held + growth


def run_on_cuda(function: Callable[[list[Any]], Any], args: list[Any], held: int) -> tuple[Any, int | None]:
    """The device's statistics are the user's: they are read, and not reset."""
    torch.cuda.synchronize()
    before, highest = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    result = function(args)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return result, held + peak - before if peak > highest else None


def storages(values: Sequence[Any]) -> dict[int, int]:
    """Address and bytes of the memory of ``values``."""
    found = {}
    for value in values:
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found
