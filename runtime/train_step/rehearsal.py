"""A step with the least memory, measured by the allocator's own record and taken back: nothing of it remains."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import nn

from ... import torch_internals
from ...formatting import bytes_text
from .buffers import Buffers
from .replay import cuda_random_state


@contextlib.contextmanager
def taken_back(model: nn.Module) -> Iterator[None]:
    """Buffers and random generators are afterwards what they were before."""
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    devices = cuda_random_state()
    buffers = Buffers(model)
    try:
        yield
    finally:
        buffers.restore()
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        numpy.random.set_state(generators[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def give_back() -> None:
    """Hand freed memory back to the system: what the C library keeps counts as the process's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def held_by(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages of ``tensors`` that are allocated."""
    with torch_internals.plain_tensors():
        return sum({torch_internals.storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


#: Bytes of a few scalars that an optimizer's later steps have and its first, the one that is rehearsed, has not.
SCALARS = 256
#: Begins the names of the marks that a diary leaves in a profile.
_MARK = "effcc-diary:"


@dataclass
class Diary:
    """What was done when, and which parameters and states were here then: tells what held the peak."""

    here: Callable[[], dict[str, int]]
    rows: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    doing: str = "the forward"

    def note(self, doing: str = "") -> None:
        self.doing = doing or self.doing
        with torch.profiler.record_function(f"{_MARK}{len(self.rows)}"):
            self.rows.append((self.doing, self.here()))

    def at(self, mark: str, peak: int) -> str:
        """What held ``peak`` bytes, in words; ``mark``: the last one before it."""
        number = mark.removeprefix(_MARK)
        if not number:
            return f"the peak, at its beginning: all of the {bytes_text(peak)} by inputs and what is computed"
        doing, here = self.rows[int(number)]
        named = sorted(here.items(), key=lambda item: -item[1])[:3]
        words = "".join(f"{bytes_text(size)} by {name}, " for name, size in named)
        rest = peak - sum(here.values())
        return f"the peak, during {doing}: {words}{bytes_text(rest)} by gradients, saved and new values"


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector has done its work and rests meanwhile: when it would free what is in cycles depends on what
    was done before, and a later step may find it later."""
    on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def measured(run: Callable[[], Any], diary: Diary, device: torch.device) -> tuple[int | None, str]:
    """The most bytes that ``run()`` held above what was held before, and the diary's mark at that moment. None where
    it cannot be measured, because a profiler is on."""
    if device.type != "cuda":
        with _no_collection():
            _, growth, mark = torch_internals.peak_and_mark(run, _MARK)
        return growth, mark
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, ""
