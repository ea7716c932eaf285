"""Values that leave the device between forward and backward: three ops, and the memory they put values in.

``effcc::swap_out(x)`` copies x to the host and returns a handle: a tensor of one byte whose storage holds all of x.
``effcc::swap_in(handle, size, stride, dtype, device)`` brings it back as a new tensor of that layout. What the forward
saves is the handle, so the device's memory is free as soon as the copy is done.

For a CUDA device the host is pinned memory, and copies run beside the ops, on a stream for each direction: ``swap_in``
begins a copy and returns, ``effcc::swap_wait(x)`` stands before the first op that reads x. For the CPU, whose memory is
the device, the host is a file: created, filled to its size (so that a full disk is an error here, not later) and
unlinked at once, so that nothing is left behind however the process ends. The system writes it out as it needs memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch

from ..errors import SwapError
from .swap_file import fill, unlinked_file

_library = torch.library.Library("effcc", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("swap_out(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
# It writes its argument as far as others can tell: what reads x stays behind it.
_library.define("swap_wait(Tensor(a!) x) -> ()")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "swap_in(Tensor handle, SymInt[] size, SymInt[] stride, ScalarType dtype, Device device) -> Tensor"
)

_directory: Path | None = None
#: Device and direction -> the stream of those copies.
_streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}
#: Address of what is being copied in -> the event that its copy ends with.
_arriving: dict[int, torch.cuda.Event] = {}


def set_directory(path: str | os.PathLike[str] | None) -> None:
    """Where files of swapped values lie; None: the system's temporary directory."""
    global _directory
    _directory = None if path is None else Path(path)


def file_backed(size: int) -> torch.Tensor:
    """``size`` bytes in an unlinked file, as a tensor. Raises SwapError for a full disk or a directory that cannot be
    written to."""
    folder = _directory or Path(tempfile.gettempdir())
    descriptor = unlinked_file(folder)
    try:
        fill(descriptor, 0, max(size, 1), folder)
        # The tensor's storage keeps the mapping, and the mapping the file. The allocator does not count it.
        return torch.frombuffer(mmap.mmap(descriptor, max(size, 1)), dtype=torch.uint8)
    except OSError as error:
        raise SwapError(
            f"{size} bytes cannot be swapped out: {error.strerror}",
            where=str(folder),
            remedy="Choose another directory.",
        ) from error
    finally:
        os.close(descriptor)


def extent(x: torch.Tensor) -> int:
    """Bytes that x spans in its storage, from its first element to its last."""
    if x.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(x.size(), x.stride(), strict=True))
    return (1 + last) * x.element_size()


def runs_beside(device: torch.device) -> bool:
    """Whether copies run beside the device's ops."""
    return device.type == "cuda"


def stream_of(device: torch.device, direction: str) -> torch.cuda.Stream:
    """The stream that a device's copies ``out``, ``in`` or ``both`` ways run on."""
    found = _streams.get((device, direction))
    if found is None:
        found = _streams[device, direction] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return found


def swap_out(x: torch.Tensor) -> torch.Tensor:
    size = extent(x)
    if x.is_cuda:
        host = torch.empty(max(size, 1), dtype=torch.uint8, pin_memory=True)
        stream = stream_of(x.device, "out")
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            laid_out(host, x.size(), x.stride(), x.dtype).copy_(x, non_blocking=True)
        x.record_stream(stream)
    else:
        host = file_backed(size)
        laid_out(host, x.size(), x.stride(), x.dtype).copy_(x)
    return host[:1]


def swap_in(
    handle: torch.Tensor, size: list[int], stride: list[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(handle.untyped_storage())
    source = laid_out(whole, torch.Size(size), tuple(stride), dtype)
    result = torch.empty_strided(size, stride, dtype=dtype, device=device)
    if device.type == "cuda":
        stream = stream_of(device, "in")
        stream.wait_stream(stream_of(device, "out"))  # what it reads has arrived on the host
        stream.wait_stream(torch.cuda.current_stream(device))  # what lay in its memory before is no longer read
        with torch.cuda.stream(stream):
            result.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(stream)
        result.record_stream(stream)
        _arriving[result.data_ptr()] = done
        return result
    return result.copy_(source)


def swap_wait(x: torch.Tensor) -> None:
    done = _arriving.pop(x.data_ptr(), None)
    if done is not None:
        torch.cuda.current_stream(x.device).wait_event(done)


def laid_out(host: torch.Tensor, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A view of the bytes ``host`` as a tensor of that layout."""
    count = host.numel() // dtype.itemsize
    return host[: count * dtype.itemsize].view(dtype).as_strided(size, stride)


def _fake_out(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, dtype=torch.uint8, device="cpu")


def _fake_in(
    handle: torch.Tensor, size: list[int], stride: list[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


_library.impl("swap_out", swap_out, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("swap_in", swap_in, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("swap_wait", swap_wait, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("effcc::swap_wait", lambda x: None)
torch.library.register_fake("effcc::swap_out", _fake_out)
torch.library.register_fake("effcc::swap_in", _fake_in)
