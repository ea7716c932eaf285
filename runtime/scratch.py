"""Scratch arenas: memory for values that live and die inside one region, kept from region to region.

Fresh memory costs a page fault for every 4 KiB on first touch, which at training sizes is a sixth of a step; an arena
pays it once a graph. An arena belongs to one running region at a time (threads take different ones); sizes are in
bytes.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch


class ScratchPool:
    """Arenas of one device. All have the size of the largest request so far."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes = 0
        self.free: list[torch.Tensor] = []
        self.lock = threading.Lock()

    def reserve(self, size: int) -> None:
        """Arenas taken from now on hold at least ``size`` bytes."""
        with self.lock:
            if size > self.bytes:
                self.bytes = size
                self.free.clear()

    def take(self) -> torch.Tensor:
        """An arena that nobody else uses, as a tensor of bytes."""
        with self.lock:
            if self.free:
                return self.free.pop()
            size = self.bytes
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def give(self, arena: torch.Tensor) -> None:
        """Return an arena. One that has become too small is dropped."""
        with self.lock:
            if arena.numel() == self.bytes:
                self.free.append(arena)

    def release(self) -> None:
        """Free the arenas that are not in use."""
        with self.lock:
            self.free.clear()


_pools: weakref.WeakKeyDictionary[Any, ScratchPool] = weakref.WeakKeyDictionary()


def pool(device: str, owner: Any) -> ScratchPool:
    """The pool of one compiled graph on a device (``cpu``, ``cuda:0``). Graphs do not share: the arenas of one with
    large regions would raise the peak of another."""
    found = _pools.get(owner)
    if found is None:
        found = _pools[owner] = ScratchPool(device)
    return found


def release() -> None:
    """Free all arenas that are not in use."""
    for each in list(_pools.values()):
        each.release()
