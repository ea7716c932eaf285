"""Gradients of a step, added up over the replicas of a pipeline and over the ranks that share a parameter.

A parameter's gradient is whole after the last pass of this rank that adds to it; then its sum over the replicas begins,
on a lane of its own, while other passes run. What lies on several ranks of a pipeline (tied embeddings) follows at the
end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...passes.pipeline_parallel.schedule import Pass, Schedule
from ..mesh_layout import MeshLayout, summed
from .communication import Lane
from .parameters import RankParameters


class GradientSums:
    """Made on all processes together. ``begin``, ``after`` each pass, ``finish``."""

    def __init__(self, schedule: Schedule, parameters: RankParameters, layout: MeshLayout, timeout: timedelta) -> None:
        self._parameters = parameters
        self._order = schedule.orders[layout.rank]
        self._end_kind = schedule.end_kind
        self._shared = {
            path: group
            for path, owners in parameters.shared_paths().items()  # all processes make all groups, in one order
            if (group := layout.row_group(timeout, owners)) is not None
        }
        self.lane = Lane("replicas", layout.replica_group(timeout)) if layout.replicas > 1 else None

    def begin(self) -> None:
        """Set aside the gradients of earlier steps: they are sums already."""
        self._left = Counter(path for each in self._order for path in self._adds_to(each))
        self._pending: list[Future[Any]] = []
        reduced = self._parameters.named if self.lane is not None else self._shared
        self._earlier = {}
        for path in reduced:
            leaf = self._parameters.named[path]
            if leaf.grad is not None:
                self._earlier[path], leaf.grad = leaf.grad, None

    def after(self, each: Pass) -> None:
        """Begin the sums over replicas of what no later pass of this rank adds to."""
        paths = self._adds_to(each)
        self._left.subtract(paths)
        ready = [self._parameters.named[path] for path in paths if not self._left[path]]
        found = [leaf.grad for leaf in ready if leaf.grad is not None]
        if found and self.lane is not None:
            group = self.lane.group
            self._pending.append(self.lane.submit(lambda: _sum_together(found, group)))

    def finish(self) -> None:
        """Wait for all sums."""
        for future in self._pending:
            future.result()
        for path, group in sorted(self._shared.items()):
            leaf = self._parameters.named[path]
            leaf.grad = summed(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, group)
        for path, earlier in self._earlier.items():
            leaf = self._parameters.named[path]
            leaf.grad = earlier if leaf.grad is None else leaf.grad + earlier

    def _adds_to(self, each: Pass) -> list[str]:
        if each.kind == self._end_kind:
            return self._parameters.paths_of_stage(each.stage)
        return {"T": self._parameters.output_paths, "D": self._parameters.input_paths}.get(each.kind, [])


def _sum_together(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Add up over the group, in one message a type."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = summed(torch.cat([gradient.flatten() for gradient in alike]), group)
        for gradient, part in zip(alike, torch.split(flat, [each.numel() for each in alike]), strict=True):
            gradient.copy_(part.view_as(gradient))
