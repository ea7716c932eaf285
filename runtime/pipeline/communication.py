"""Transfers and collectives of a pipeline's rank, on torch.distributed.

Each kind of collective is a *lane*: a process group and a thread of its own that takes the microbatches in order. So a
collective begins as soon as this rank has its part, whatever the rank computes meanwhile, and no two ranks can enter
the collectives of a group in different orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")

_OPERATIONS: dict[str, Any] = {"max": "MAX", "min": "MIN", "sum": "SUM"}


class Lane:
    """Collectives of one kind in a group of its own, one after the other."""

    def __init__(self, name: str, group: dist.ProcessGroup) -> None:
        self.name, self.group = name, group
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"effcc {name}")

    def submit(self, collective: Callable[[], _T]) -> Future[_T]:
        """Run it when those before it have ended."""
        return self._thread.submit(collective)

    def all_reduce(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        """The tensor, reduced over all ranks in place; to be called from a submitted collective."""
        dist.all_reduce(tensor, getattr(dist.ReduceOp, _OPERATIONS[operation]), group=self.group)
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """From the group's rank ``source``."""
        dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Transfers:
    """Sends and receives between neighbouring stages, ranks being those of the group. A send does not wait; its tensor
    is held until it is over."""

    def __init__(self, stages: int, group: dist.ProcessGroup) -> None:
        self.stages, self.group = stages, group
        self._pending: list[tuple[Any, torch.Tensor]] = []

    def send(self, tensors: Sequence[torch.Tensor], target: int, stage: int, microbatch: int, forward: bool) -> None:
        """``stage`` is the receiving one; with microbatch and direction it names the message."""
        self._pending = [(work, held) for work, held in self._pending if not work.is_completed()]
        for index, tensor in enumerate(tensors):
            held = tensor.detach().contiguous()
            tag = self._tag(stage, microbatch, forward, index)
            work = dist.isend(held, group=self.group, tag=tag, group_dst=target)
            if work is not None:
                self._pending.append((work, held))

    def receive(
        self, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], source: int, stage: int, microbatch: int,
        forward: bool, device: torch.device,
    ) -> list[torch.Tensor]:  # fmt: skip
        """The tensors of a message, waited for."""
        found = []
        for index, (shape, dtype) in enumerate(shapes):
            tensor = torch.empty(shape, dtype=dtype, device=device)
            tag = self._tag(stage, microbatch, forward, index)
            dist.recv(tensor, group=self.group, tag=tag, group_src=source)
            found.append(tensor)
        return found

    def finish(self) -> None:
        """Wait until all sends are over."""
        for work, _ in self._pending:
            work.wait()
        self._pending = []

    def _tag(self, stage: int, microbatch: int, forward: bool, index: int) -> int:
        return ((microbatch * self.stages + stage) * 2 + forward) * 64 + index
