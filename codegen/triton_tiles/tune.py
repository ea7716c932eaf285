"""The fastest of a few schedules, timed on the GPU at hand and remembered in effcc's cache directory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import CompileError
from ...ir.fused_cascade import FusedCascade
from ...passes.rewrite_cascade import Rewriting, rewrite
from ..fused_kernel import PlacedKernel, prepare_with
from .aot import usage
from .kernel import TritonKernel, prepare_triton
from .schedule import Launch, Shape, candidates
from .settle import Make
from .target import Target


class TunedKernel:
    """A fused cascade's kernel; its schedule is chosen with the operands of the first call."""

    def __init__(self, fused: FusedCascade, rewriting: Rewriting | None, target: Target) -> None:
        self.fused, self.rewriting, self.target = fused, rewriting or rewrite(fused.cascade), target
        self._chosen: PlacedKernel[TritonKernel] | None = None

    def __call__(self, operands: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if self._chosen is None:
            kernel = tuned(self._make, self.target, lambda each: self._placed(each)(operands))
            self._chosen = self._placed(kernel)
        return self._chosen(operands)

    def _make(self, shape: Shape, launches: Launch | None) -> TritonKernel:
        wide = frozenset(self.fused.wide)
        return prepare_with(
            prepare_triton,
            self.fused,
            self.rewriting,
            wide=wide,
            target=self.target,
            shape=shape,
            launches=launches,
        ).kernel

    def _placed(self, kernel: TritonKernel) -> PlacedKernel[TritonKernel]:
        return PlacedKernel(self.fused, kernel, {})


def tuned(make: Make, target: Target, run: Callable[[TritonKernel], Any]) -> TritonKernel:
    """``fastest``, or what an earlier process found to be. Raises ``CompileError`` if no candidate runs."""
    first = make(Shape(), None)
    about = [first.source, sorted(first.sizes.items()), torch.cuda.get_device_name(), torch.version.cuda]
    path = _folder() / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.json"
    try:
        shape, launches = json.loads(path.read_text())
        return make(Shape(*shape), Launch(*launches) if launches else None)
    except (OSError, ValueError, TypeError):  # not there, or not ours
        pass
    (best, launch), _ = fastest(make, target, run)
    told = [(best.rows, best.columns), launch and (launch.warps, launch.stages, launch.descriptors, launch.specialized)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told))
    except OSError:  # the next process times again
        pass
    return make(best, launch)


def fastest(
    make: Make, target: Target, run: Callable[[TritonKernel], Any]
) -> tuple[tuple[Shape, Launch | None], dict[tuple[Shape, Launch | None], float]]:
    """The fastest of the schedule's candidates, ``run`` on the GPU, and the milliseconds of each.

    A kernel of several launches is timed as a whole. Candidates that do not compile, or need more than the GPU has, are
    left out; raises ``CompileError`` if all are.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    first = make(Shape(), None)
    times: dict[tuple[Shape, Launch | None], float] = {}
    for choice in candidates(max((step.launch for step in first.steps), key=lambda each: each.warps), target):
        kernel = make(*choice)
        failures: tuple[type[Exception], ...] = (CompileError, OutOfResources)
        try:
            usage(kernel, target)
            times[choice] = float(do_bench(lambda kernel=kernel: run(kernel), return_mode="median"))
        except failures:
            continue
    if not times:
        raise CompileError("no candidate schedule runs", remedy="Report it.")
    return min(times, key=lambda choice: times[choice]), times


def _folder() -> Path:
    return Path(os.environ.get("EFFCC_CACHE_DIR") or "~/.cache/effcc").expanduser() / "schedules"
