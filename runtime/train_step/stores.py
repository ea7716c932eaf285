"""Where values are while they are away: a file for the CPU, pinned host memory for a GPU.

A store copies whole stretches of memory. Copies may run beside the caller: each returns a ``Copy`` to wait for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..host_tier import stream_of
from ..swap_file import Region, SwapFile


class Copy(Protocol):
    """A copy that runs."""

    def finished(self) -> bool: ...
    def wait(self) -> None:
        """Return when the copy's memory may be used or freed. Raises SwapError where the copy failed."""


class Store(Protocol):
    """Places are opaque to the caller."""

    #: Where the values are while they are not in the store.
    device: torch.device
    #: Bytes copied so far, and the seconds that it took.
    copied: int
    seconds: float

    def reserve(self, size: int) -> Any: ...
    def release(self, place: Any) -> None: ...
    def write(self, place: Any, source: torch.UntypedStorage, offset: int = 0) -> Copy:
        """Start to copy from byte ``offset`` of ``source`` to ``place``."""

    def read(self, place: Any, target: torch.UntypedStorage) -> Copy: ...


@dataclass
class _Running:
    future: Future[None]

    def finished(self) -> bool:
        return self.future.done()

    def wait(self) -> None:
        self.future.result()


class FileStore:
    """Regions of one file, copied by threads of its own."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.device = torch.device("cpu")
        self.file = SwapFile(folder)
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="effcc-swap")
        self.copied, self.seconds = 0, 0.0

    def reserve(self, size: int) -> Region:
        return self.file.reserve(size)

    def release(self, place: Region) -> None:
        self.file.release(place)

    def write(self, place: Region, source: torch.UntypedStorage, offset: int = 0) -> Copy:
        return self._start(self.file.write, place, source, offset)

    def read(self, place: Region, target: torch.UntypedStorage) -> Copy:
        return self._start(self.file.read, place, target, 0)

    def _start(
        self, copy: Callable[[Region, int], None], place: Region, storage: torch.UntypedStorage, offset: int
    ) -> Copy:
        # The thread owns the memory while it copies and no longer: who waits may then ask who else owns it, and is the
        # one that frees it. A thread lets go of its arguments when it likes, so they are emptied here.
        kept = [storage]

        def run() -> None:
            try:
                begin = time.perf_counter()
                copy(place, kept[0].data_ptr() + offset)
                self.copied, self.seconds = self.copied + place.bytes, self.seconds + time.perf_counter() - begin
            finally:
                kept.clear()

        return _Running(self.threads.submit(run))


@dataclass
class _Event:
    event: torch.cuda.Event
    device: torch.device

    def finished(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


class PinnedStore:
    """Pinned host memory, copied on a stream of the device's own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copied, self.seconds = 0, 0.0

    def reserve(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def release(self, place: torch.Tensor) -> None:
        """The tensor's last owner frees it; the pinned allocator waits for copies that use it."""

    def write(self, place: torch.Tensor, source: torch.UntypedStorage, offset: int = 0) -> Copy:
        return self._copy(place, _bytes_of(source, self.device)[offset : offset + place.numel()])

    def read(self, place: torch.Tensor, target: torch.UntypedStorage) -> Copy:
        return self._copy(_bytes_of(target, self.device), place)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        stream = stream_of(self.device, "both")  # a read stays behind the write of the same place
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        self.copied += target.numel()
        return _Event(event, self.device)


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
