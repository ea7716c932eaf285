"""Ways to generate a kernel that their prices do not tell apart, timed on the device at hand.

For the option ``measure_candidates``. The rules' own variant and the cheapest others are compiled and run in turns on
random operands; what is within the prices' error of the cheapest is timed, the rest keeps its price, in the measure of
the rules' variant. What was measured lies in ``kernels.json`` in the cache directory, by machine, beside the products'
``gemm.json``: no kernel is timed twice.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..cost_model.gemm_measurement import (
    BUSY,
    FEWEST,
    keep_measurements,
    machine_name,
    read_measurements,
    real_tensors,
)
from ..cost_model.tile_cost import KernelVariant
from ..errors import CompileError
from ..ir.fused_cascade import FusedCascade
from ..ir.types import TensorType, contiguous_stride
from ..logs import logger
from ..passes.raising.group import Group
from .cascade_kernel import build
from .cascade_op import cascade_text
from .fused_kernel import prepare_fused
from .gpu_kernel_variants import GpuKernelVariants
from .kernel_variants import KernelVariants
from .prepared import TORCH_DTYPES
from .region_store import source_digest
from .tiles.errors import NotLowerable

#: How far quotients of two variants' prices are from those of their times: nine in ten are nearer
#: (``benchmarks/kernel_choice.py`` on a CPU). Where a variant's price is not told apart even above that, as on a GPU,
#: that counts.
ERROR = 0.12
#: Variants of one kernel that are timed at most, the rules' one included; rounds; seconds after which no more follow.
MOST, ROUNDS, ROUND_SECONDS = 4, 15, 0.5
#: Bytes of operands and results beyond which a kernel is not timed: the model itself has to fit, too.
LARGEST = 1 << 30

_log = logger("cascades")
Run = Callable[[Sequence[torch.Tensor]], Any]


class Variants(Protocol):
    def __call__(self, group: Group) -> tuple[KernelVariant, ...]: ...


@dataclass(frozen=True)
class TimedVariants:
    """``priced``, with times in place of prices where those do not decide. ``directory``: where times are kept."""

    priced: KernelVariants | GpuKernelVariants
    directory: Path

    def __call__(self, group: Group) -> tuple[KernelVariant, ...]:
        found = self.priced(group)
        close = close_ones(found, ERROR)
        if not close or _bytes(group.fused) > LARGEST or (self.on_gpu and not torch.cuda.is_available()):
            return found
        seconds = self.known(group.fused) or {}
        if not all(_name(each) in seconds for each in close):
            seconds = self.timed(group, close)
            if not seconds:
                return found
            self.remember(group.fused, seconds)
        return with_times(found, {each: seconds[_name(each)] for each in close})

    @property
    def on_gpu(self) -> bool:
        return isinstance(self.priced, GpuKernelVariants)

    # Timing -----------------------------------------------------------------------------------------------------------

    def timed(self, group: Group, close: Sequence[KernelVariant]) -> dict[str, float]:
        """Seconds of each; none where one does not compile, or other work held the processor."""
        scheduled = [replace(group.fused, schedule=dict(each.schedule)) for each in close]
        try:
            runs = self.on_a_gpu(scheduled, group) if self.on_gpu else _on_this_cpu(scheduled, group)
        except (CompileError, NotLowerable) as error:
            _log.info("ways to generate %s were not timed: %s", group.name, error.message)
            return {}
        with real_tensors():
            device = "cuda" if self.on_gpu else "cpu"
            best = fastest_rounds(runs, [_operand(kind, device) for kind in group.fused.operands], self.on_gpu)
        return {_name(each): seconds for each, seconds in zip(close, best, strict=True)} if best else {}

    def on_a_gpu(self, scheduled: Iterable[FusedCascade], group: Group) -> list[Run]:
        from .triton_tiles.settle import placed

        assert isinstance(self.priced, GpuKernelVariants)
        target, wide = self.priced.target, frozenset(group.wide)
        return [placed(each, group.rewriting, target, wide=wide) for each in scheduled]

    # What is known ----------------------------------------------------------------------------------------------------

    @property
    def machine(self) -> str:
        return torch.cuda.get_device_name() if self.on_gpu else machine_name()

    def known(self, fused: FusedCascade) -> dict[str, float] | None:
        return read_measurements(self.directory / "kernels.json").get(self.machine, {}).get(_key(fused))

    def remember(self, fused: FusedCascade, seconds: dict[str, float]) -> None:
        try:
            keep_measurements(self.directory / "kernels.json", self.machine, {_key(fused): seconds})
        except OSError as error:
            _log.info("times of kernels are not kept: %s", error)


def close_ones(found: Sequence[KernelVariant], error: float) -> list[KernelVariant]:
    """The rules' variant, the first, and the cheapest of those whose prices may be wrong about which is the fastest, by
    ``error`` or what is told apart of each; none where one price speaks against all others."""
    least = min((each.seconds for each in found), default=0.0)
    close = [each for each in found if each.seconds <= (1 + max(error, each.alike)) * least]
    close.sort(key=lambda each: each.seconds)
    if len(close) < 2:
        return []
    return [found[0], *[each for each in close if each is not found[0]][: MOST - 1]]


def with_times(found: Sequence[KernelVariant], seconds: dict[KernelVariant, float]) -> tuple[KernelVariant, ...]:
    """Times in place of prices: one that is shorter than the rules' variant's speaks for itself. What was not timed has
    its price by the rules' variant's time, told apart as before."""
    scale = seconds[found[0]] / found[0].seconds
    return tuple(
        replace(each, seconds=seconds[each], measured=True, alike=0.0)
        if each in seconds
        else replace(each, seconds=scale * each.seconds)
        for each in found
    )


def fastest_rounds(runs: Sequence[Run], operands: Sequence[torch.Tensor], on_gpu: bool) -> list[float]:
    """The shortest of the rounds of each, in turns; none where other processes took so much of the processor that the
    figures mean nothing."""
    best = [float("inf")] * len(runs)
    for run in runs:
        run(operands)
    begin, used = time.perf_counter(), time.process_time()
    for done in range(ROUNDS):
        for index, run in enumerate(runs):
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run(operands)
            if on_gpu:
                torch.cuda.synchronize()
            best[index] = min(best[index], time.perf_counter() - start)
        if done + 1 >= FEWEST and time.perf_counter() - begin > ROUND_SECONDS:
            break
    share = (time.process_time() - used) / (time.perf_counter() - begin)
    # A kernel with few tiles does not use every thread: one of them must have run.
    return best if on_gpu or share >= BUSY * min(1, os.cpu_count() or 1) else []


def _on_this_cpu(scheduled: Iterable[FusedCascade], group: Group) -> list[Run]:
    kernels = [prepare_fused(each, group.rewriting, wide=frozenset(group.wide)) for each in scheduled]
    build([each.kernel for each in kernels])
    return list(kernels)


def _operand(kind: TensorType, device: str) -> torch.Tensor:
    """Numbers as activations have them, both of a mask's values, the first entry of every table."""
    shape = [int(size) for size in kind.shape]
    stride = [int(step) for step in kind.stride or contiguous_stride(kind.shape)]
    own = [1 if step == 0 else size for size, step in zip(shape, stride, strict=True)]
    made = torch.empty_strided(own, stride, dtype=TORCH_DTYPES[kind.dtype], device=device)
    if kind.dtype == "b1":
        made.random_(0, 2)
    else:
        made.normal_() if made.is_floating_point() else made.zero_()
    return made.expand(shape)


def _bytes(fused: FusedCascade) -> int:
    total = 0
    for kind in (*fused.operands, *fused.results):
        count = TORCH_DTYPES[kind.dtype].itemsize
        for size in kind.shape:
            if not isinstance(size, int):
                return LARGEST + 1  # not known before it runs
            count *= size
        total += count
    return total


def _name(variant: KernelVariant) -> str:
    return " ".join(f"{name} {figure}" for name, figure in variant.schedule) or "rule"


def _key(fused: FusedCascade) -> str:
    text = cascade_text(replace(fused, schedule={}, thread_bytes=0, shared_bytes=0))
    return hashlib.sha256(f"{source_digest()}\n{text}".encode()).hexdigest()[:32]
