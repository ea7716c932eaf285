"""Memory that a library's convolution holds for itself while it runs, by running it.

oneDNN reorders operands to blocks of channels, or copies an image into columns: which, and how much of it, depends on
the processor, the sizes, the layouts and the number of threads. No formula says it, and the allocator does. Each
distinct call is run twice in a process, on zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_iter, tree_map_only

from .. import torch_internals
from ..cost_model.gemm_measurement import real_tensors
from .sizes import size_hints

MEASURED = {
    "extern_kernels.convolution": torch.ops.aten.convolution.default,
    "torch.ops.aten.convolution.default": torch.ops.aten.convolution.default,
    "torch.ops.aten.convolution_backward.default": torch.ops.aten.convolution_backward.default,
}


@dataclass(frozen=True)
class Operand:
    """A tensor in the CPU's memory that a call reads."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype).zero_()


@dataclass(frozen=True)
class LibraryCall:
    """``op`` is a key of ``MEASURED``; arguments are operands, numbers, None, and tuples of these."""

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


def workspace_of(call: LibraryCall) -> int | None:
    """Bytes beyond operands and results; None where that cannot be found out now (no memory, a profiler is on)."""
    try:
        return _measured(call, torch.get_num_threads())
    except (RuntimeError, MemoryError, _NotSeenError):
        return None


class _NotSeenError(Exception):
    """The allocator's record belongs to someone else."""


@functools.cache
def _measured(call: LibraryCall, threads: int) -> int:
    def run() -> Any:
        return MEASURED[call.op](*args, **kwargs)

    with real_tensors():
        args, kwargs = tree_map_only(Operand, Operand.zeros, (list(call.args), dict(call.kwargs)))
        run()  # what is made once is there now
        made, growth = torch_internals.peak_growth(run)
    if growth is None:
        raise _NotSeenError
    results = [value.untyped_storage().nbytes() for value in tree_iter(made) if isinstance(value, torch.Tensor)]
    return max(0, growth - sum(results))


def traced_workspaces(gm: fx.GraphModule) -> Mapping[str, int]:
    """Node name -> bytes, for the convolutions of a graph that is not compiled yet: on channels-last images, which
    Inductor makes of them on a CPU."""
    found = {}
    for node in gm.graph.nodes:
        op = f"torch.ops.{node.target}"
        if node.op == "call_function" and op in MEASURED:
            call = _traced_call(op, node)
            size = workspace_of(call) if call is not None else None
            if size is not None:
                found[node.name] = size
    return found


def _traced_call(op: str, node: fx.Node) -> LibraryCall | None:
    layouts: dict[Any, Operand] = {}
    for given in node.all_input_nodes:
        layout = layout_of(given.meta.get("val"))
        if layout is None:
            return None
        layouts[given] = _channels_last(layout)
    args, kwargs = tree_map_only(fx.Node, layouts.__getitem__, (list(node.args), dict(node.kwargs)))
    return LibraryCall(op, _hashable(args), _hashable(tuple(kwargs.items())))


def layout_of(value: Any) -> Operand | None:
    """None for what is no tensor in the CPU's memory, or has sizes that are not known."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return None
    shape, strides = size_hints(value.shape), size_hints(value.stride())
    return Operand(shape, strides, value.dtype) if shape is not None and strides is not None else None


def _channels_last(layout: Operand) -> Operand:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if len(layout.shape) not in formats:
        return layout
    like = torch.empty(layout.shape, device="meta", memory_format=formats[len(layout.shape)])
    return replace(layout, strides=like.stride())


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
