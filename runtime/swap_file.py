"""Files that swapped values lie in: made, filled to their size, and unlinked at once.

A file has no name while it is used, so nothing is left behind however the process ends, and processes that share a
directory cannot meet. Space is reserved before anything is written: a full disk is an error then, not later.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from ..errors import SwapError

#: Regions begin and end at multiples of this, the size of a page.
_ALIGNMENT = 4096


def unlinked_file(folder: Path) -> int:
    """The descriptor of a new, empty file in ``folder`` that no longer has a name. Raises SwapError."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="effcc-swap-", dir=folder)
    except OSError as error:
        raise SwapError(
            f"no swap file can be made in {folder}: {error.strerror}",
            where=str(folder),
            remedy="Choose a directory that exists and can be written to.",
        ) from error
    os.unlink(name)
    return descriptor


def fill(descriptor: int, offset: int, size: int, folder: Path) -> None:
    """Reserve ``size`` bytes of the disk from ``offset`` on. Raises SwapError where there is no room."""
    try:
        os.posix_fallocate(descriptor, offset, size)
    except OSError as error:
        raise _refused(f"{size} bytes cannot be swapped out", error, folder) from error


def _refused(what: str, error: OSError, folder: Path) -> SwapError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return SwapError(
        f"{what}: {error.strerror}",
        where=str(folder),
        remedy="Free space there, or choose another directory." if full else "Choose another directory.",
    )


@dataclass
class Region:
    """A place in a file for ``bytes`` bytes. ``written``: what was put there, as a sum; None: nothing yet."""

    offset: int
    bytes: int
    written: int | None = None


class SwapFile:
    """One file with many regions; regions may be read and written from several threads."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = Path(folder) if folder is not None else Path(tempfile.gettempdir())
        self.descriptor = unlinked_file(self.folder)
        self.size = 0
        self.free: dict[int, list[int]] = defaultdict(list)
        self.lock = threading.Lock()

    def reserve(self, size: int) -> Region:
        """Room for ``size`` bytes: what another region of that size has left, else at the file's end."""
        room = -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
        with self.lock:
            if self.free[room]:
                return Region(self.free[room].pop(), size)
            self._check_size()
            fill(self.descriptor, self.size, room, self.folder)
            offset, self.size = self.size, self.size + room
        return Region(offset, size)

    def release(self, region: Region) -> None:
        with self.lock:
            self.free[-(-max(region.bytes, 1) // _ALIGNMENT) * _ALIGNMENT].append(region.offset)

    def write(self, region: Region, address: int) -> None:
        """Put the memory at ``address`` into ``region``. Raises SwapError for a disk that is full or fails."""
        self._check_size()
        left, at = memory_at(address, region.bytes), region.offset
        region.written = checksum(left)
        while len(left):
            try:
                done = os.pwrite(self.descriptor, left, at)
            except OSError as error:
                raise _refused(f"{region.bytes} bytes cannot be swapped out", error, self.folder) from error
            left, at = left[done:], at + done

    def read(self, region: Region, address: int) -> None:
        """Bring ``region`` back to the memory at ``address``. Raises SwapError where it is not what was written."""
        whole = left = memory_at(address, region.bytes)
        at = region.offset
        while len(left):
            try:
                done = os.preadv(self.descriptor, [left], at)
            except OSError as error:
                raise _refused(f"{region.bytes} bytes cannot be brought back", error, self.folder) from error
            if done == 0:
                raise self._damaged("ends too early: it was cut short while it was in use")
            left, at = left[done:], at + done
        if region.written is not None and checksum(whole) != region.written:
            raise self._damaged("does not hold what was written to it")

    def _check_size(self) -> None:
        """A file that was cut short would grow again with zeros in it by the next write."""
        if os.fstat(self.descriptor).st_size < self.size:
            raise self._damaged("ends too early: it was cut short while it was in use")

    def _damaged(self, how: str) -> SwapError:
        return SwapError(
            f"the swap file {how}",
            where=str(self.folder),
            remedy="What was in it is lost. Start again from the last checkpoint, with a directory of its own.",
        )

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def memory_at(address: int, size: int) -> memoryview:
    """``size`` bytes of memory, whose owner must outlive the view."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def checksum(data: memoryview) -> int:
    """A sum of 64-bit words: as fast as memory, and zeros in the place of values change it."""
    words = len(data) // 8 * 8
    total = int(numpy.add.reduce(numpy.frombuffer(data[:words], numpy.uint64))) if words else 0
    return (total + int.from_bytes(data[words:], "little")) % 2**64


def tensor_checksum(value: torch.Tensor) -> int:
    """``checksum`` of a CPU tensor's elements."""
    dense = value.detach().contiguous()
    return checksum(memory_at(dense.data_ptr(), dense.nbytes)) if dense.nbytes else 0
