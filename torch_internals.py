"""Every private torch name that the runtime and the backend use, in one place; tested on torch 2.11 to 2.13.

Nothing here decides anything: each function wraps one internal, so that a torch release that moves a name is mended in
this file alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._guards import TracingContext
from torch._inductor.utils import fresh_cache as _fresh_cache  # noqa: F401  (kept for tests that need a cold cache)

__all__ = [
    "cache_directory",
    "collect_output_strides",
    "compile_fx",
    "compile_region",
    "is_invoke_subgraph",
    "donated_inputs",
    "donating",
    "lowering_error_target",
    "report_output_strides",
    "structured_trace",
    "without_autograd_cache",
]


def compile_fx(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], inner: Callable[..., Any]) -> Any:
    """Inductor's front half (joint-graph passes, decompositions, min-cut partition) around our ``inner`` compiler."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    return inductor_compile_fx(gm, list(example_inputs), inner_compile=inner)


def compile_region(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor's back half: one FX graph to loops, kernels and a wrapper. Raises what Inductor raises."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(gm, list(example_inputs), **kwargs)


@contextlib.contextmanager
def without_autograd_cache() -> Iterator[None]:
    """AOTAutograd's own cache would hand back code that Inductor, not effcc, compiled for the same graph."""
    import torch._functorch.config as functorch_config

    with functorch_config.patch(enable_autograd_cache=False):
        yield


@contextlib.contextmanager
def cache_directory(path: Path | None) -> Iterator[None]:
    """Inductor's code cache under ``path`` while inside; None leaves it where it is."""
    if path is None:
        yield
        return
    import os

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


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


def is_invoke_subgraph(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.higher_order.invoke_subgraph


def lowering_error_target(error: BaseException) -> str:
    """Name of the op that Inductor could not lower (``aten.foo.default``), or ``""`` when the error names none."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        for line in str(current).splitlines():
            if line.strip().startswith("target: "):
                return line.strip()[len("target: ") :]
        current = current.__cause__ or current.__context__
    return ""


def structured_trace(name: str, text: Callable[[], str]) -> None:
    """Hand a text artifact to ``TORCH_TRACE`` / tlparse."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def cudagraphs_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether this compilation is to be recorded as a CUDA graph (``mode="reduce-overhead"``)."""
    return bool(kwargs.get("cudagraphs") or False)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's settings of a ``torch.compile`` mode such as ``reduce-overhead``."""
    if not mode or mode == "default":
        return {}
    return dict(torch._inductor.list_mode_options(mode))


def inductor_settings(settings: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    return inductor_config.patch(settings)  # type: ignore[no-any-return]
