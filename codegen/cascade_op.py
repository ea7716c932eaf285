"""``torch.ops.effcc.cascade``: a fused cascade as an op, so that partitioners and Inductor take it as it is.

The op's text is the cascade's (``ir.fused_cascade_text``). Its kernel is made once a process, from that text alone:
code that an earlier process compiled and cached finds everything it needs in its own call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..ir.fused_cascade import FusedCascade
from ..ir.fused_cascade_text import fused_cascade_lines
from ..ir.parser import parse_fused_cascade
from ..ir.types import TensorType, contiguous_stride
from ..passes.rewrite_cascade import Rewriting
from .cascade_kernel import TORCH_DTYPES, CascadeKernel
from .chunked_cascade import ChunkedCascade
from .eager_cascade import EagerCascade
from .fused_kernel import PlacedKernel, prepare_fused, prepare_with

if TYPE_CHECKING:
    from .triton_tiles.kernel import TritonKernel
    from .triton_tiles.target import Target

#: What the op runs on a CPU.
CpuKernel: TypeAlias = "PlacedKernel[CascadeKernel] | PlacedKernel[ChunkedCascade]"

_library: Any = torch.library.Library("effcc", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("cascade(str text, Tensor[] operands) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))

#: Rewritten forms and kernels that this process has at hand, by the op's text.
_rewritten: dict[str, Rewriting] = {}
_kernels: dict[str, CpuKernel] = {}
#: Text of a cascade without its workspace -> the op's text.
_texts: dict[str, str] = {}
#: The same for GPUs, with all that the kernel depends on besides, and the kernel: equal layers have equal ones.
_on_gpu: dict[tuple[str, Target, str, bool], tuple[str, PlacedKernel[TritonKernel]]] = {}


def cascade_text(fused: FusedCascade) -> str:
    return "\n".join(fused_cascade_lines("@fused", fused))


def prepare(fused: FusedCascade, rewriting: Rewriting) -> tuple[str, CpuKernel]:
    """The op's text for a cascade, and its kernel, not compiled yet. Raises ``NotLowerable``."""
    plain = cascade_text(fused)
    if plain not in _texts:
        kernel = _prepare_on_cpu(fused, rewriting)
        own = kernel.kernel
        text = cascade_text(replace(fused, thread_bytes=own.scratch_bytes, shared_bytes=own.buffer_bytes))
        _rewritten[text], _kernels[text], _texts[plain] = rewriting, kernel, text
    return _texts[plain], _kernels[_texts[plain]]


def prepare_on_gpu(
    fused: FusedCascade, rewriting: Rewriting | None, target: Target
) -> tuple[str, PlacedKernel[TritonKernel]]:
    """``prepare`` for a GPU. What the op runs is compiled, with a settled schedule, at its first call. Raises
    ``NotLowerable``."""
    from .triton_tiles.kernel import float32_precision, is_interpreted, prepare_triton
    from .triton_tiles.schedule import chosen

    key = (cascade_text(replace(fused, thread_bytes=0, shared_bytes=0)), target, float32_precision(), is_interpreted())
    if key not in _on_gpu:
        settings = chosen(fused.schedule)
        kernel = prepare_with(prepare_triton, fused, rewriting, wide=frozenset(fused.wide), target=target, **settings)
        text = cascade_text(replace(fused, thread_bytes=0, shared_bytes=kernel.kernel.buffer_bytes))
        if rewriting is not None:
            _rewritten.setdefault(text, rewriting)
        _on_gpu[key] = text, kernel
    return _on_gpu[key]


def gpu_source(text: str, target: Target) -> str:
    """The Triton of the op with this text, as it is before a schedule is settled."""
    return prepare_on_gpu(parse_fused_cascade(text), _rewritten.get(text), target)[1].kernel.source


def _prepare_on_cpu(fused: FusedCascade, rewriting: Rewriting | None) -> CpuKernel:
    if not fused.chunks:
        return prepare_fused(fused, rewriting, wide=frozenset(fused.wide))
    sizes = {name: int(size) for name, size in fused.sizes.items()}
    outputs = [view.tensor for view in fused.outputs]
    return PlacedKernel(fused, ChunkedCascade(fused.cascade, sizes, fused.chunks, fused.dtypes, outputs), {})


def kernel_of(text: str) -> CpuKernel:
    kernel = _kernels.get(text)
    if kernel is None:
        fused = parse_fused_cascade(text)
        kernel = _kernels[text] = _prepare_on_cpu(fused, _rewritten.get(text))
    return kernel


def give_up_kernel(text: str) -> None:
    """The op with this text runs as eager ops from now on, for its kernel does not compile."""
    placed: Any = kernel_of(text)
    placed.kernel = EagerCascade(placed.fused.cascade, placed.sizes)


@torch.library.impl(_library, "cascade", "CPU")
def run(text: str, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list(kernel_of(text)(operands))


@torch.library.impl(_library, "cascade", "CUDA")
def run_on_gpu(text: str, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.cuda.device(operands[0].device):
        return list(gpu_kernel_of(text, operands[0].device.index)(operands))


@functools.cache
def gpu_kernel_of(text: str, device: int) -> Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]:
    """The kernel in Triton, with the schedule that is settled for this GPU, or with the fastest of several if the
    variable ``EFFCC_TUNE_KERNELS`` is set."""
    from .gpu_cascade import GpuCascade
    from .triton_tiles.target import Target
    from .triton_tiles.tune import TunedKernel

    fused = parse_fused_cascade(text)
    if os.environ.get("EFFCC_TUNE_KERNELS"):
        return TunedKernel(fused, _rewritten.get(text), Target.of_cuda(device))
    return GpuCascade(fused, _rewritten.get(text), Target.of_cuda(device))


@torch.library.register_fake("effcc::cascade", lib=_library)  # type: ignore[untyped-decorator]
def shapes(text: str, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [_empty(kind, operands[0]) for kind in _results(text)]


@functools.cache
def _results(text: str) -> tuple[TensorType, ...]:
    return parse_fused_cascade(text).results


def _empty(kind: TensorType, like: torch.Tensor) -> torch.Tensor:
    strides = kind.stride or contiguous_stride(kind.shape)
    return like.new_empty_strided(kind.shape, strides, dtype=TORCH_DTYPES[kind.dtype])
