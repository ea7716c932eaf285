"""Inductor's two halves around our compiler, and what they tell each other about a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import TracingContext


def compile_fx(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], inner: Callable[..., Any]) -> Any:
    """Inductor's front half (joint-graph passes, decompositions, min-cut partition) around our ``inner`` compiler."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    return inductor_compile_fx(gm, list(example_inputs), inner_compile=inner)


def compile_region(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor's back half: one FX graph to loops, kernels and a wrapper. Raises what Inductor raises."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(gm, list(example_inputs), **kwargs)


def compile_writer(
    function: Callable[..., None], like: Sequence[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
) -> Callable[[list[torch.Tensor]], Any]:
    """Inductor's code of a function that only writes into some of its tensors. ``like``: their shapes, strides and
    dtypes. Other compilations under way are not touched. Raises what Inductor raises."""
    from torch._guards import tracing
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad(), FakeTensorMode() as mode, tracing(TracingContext(mode)):
        inputs = [torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in like]

        def returning(*tensors: torch.Tensor) -> tuple[()]:
            function(*tensors)
            return ()

        gm = make_fx(returning, decomposition_table=select_decomp_table())(*inputs)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return compile_region(gm, inputs)  # type: ignore[no-any-return]


@contextlib.contextmanager
def collect_output_strides() -> Iterator[list[Any]]:
    """The strides that regions compiled inside report for their outputs; the surrounding record is left untouched."""
    context = TracingContext.try_get()
    collected: list[Any] = []
    if context is None:
        yield collected
        return
    before = context.output_strides
    context.output_strides = collected if before is not None else None
    try:
        yield collected
    finally:
        context.output_strides = before


def report_output_strides(strides: Sequence[tuple[int, ...] | None]) -> None:
    """Tell AOTAutograd the strides of a compiled graph's outputs, from which it lays out the backward's inputs."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.clear()
        context.output_strides.extend(strides)


def saved_outputs(total: int) -> int:
    """How many of the ``total`` outputs of the forward being compiled are kept for the backward."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    returned = getattr(metadata, "num_forward_returns", None)
    return max(0, total - returned) if returned is not None else 0


def donated_inputs() -> list[int]:
    """Inputs of the backward graph being compiled whose memory it may reuse, by position."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return list(getattr(metadata, "bw_donated_idxs", None) or [])


@contextlib.contextmanager
def donating(positions: Sequence[int]) -> Iterator[None]:
    """Inside, Inductor may reuse the memory of just these inputs of the graph that it compiles."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        yield
        return
    before = metadata.bw_donated_idxs
    metadata.bw_donated_idxs = list(positions)
    try:
        yield
    finally:
        metadata.bw_donated_idxs = before


def compile_error_cause(error: BaseException) -> BaseException:
    """What went wrong, without the exceptions that Inductor wraps around it."""
    while isinstance(getattr(error, "inner_exception", None), BaseException):
        error = error.inner_exception  # type: ignore[attr-defined]
    return error


def lowering_error_target(error: BaseException) -> str:
    """Name of the op that Inductor could not lower (``aten.foo.default``), or ``""`` when the error names none."""
    for line in str(compile_error_cause(error)).splitlines():
        if line.strip().startswith("target: "):
            return line.strip()[len("target: ") :]
    return ""
