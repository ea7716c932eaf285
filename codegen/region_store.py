"""Compiled graphs kept between processes: which compiled regions a captured graph became, and what calls them.

A record names regions by their keys in Inductor's code cache, so that a graph compiled before is neither rewritten nor
cut nor hashed piece by piece again. A record that is damaged, or whose regions are gone, counts as absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import torch.fx as fx

from .. import torch_internals
from .kernel_batch import Collector, collecting
from .region_compiler import CompiledSegment, CompiledSegments
from .scratch import ScratchLayout

R = TypeVar("R", bound=msgspec.Struct)


class TensorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input of a region: shape and strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str


class ScratchRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Offsets in bytes of a region's buffers in the scratch arena, and the arena's height."""

    offsets: dict[str, int]
    height: int


class RegionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One distinct region: the host module's name for it, its key in the code cache, what the report says of it."""

    function: str
    identity: str
    key: str
    inputs: tuple[TensorRecord, ...]
    static_inputs: tuple[int, ...]
    kernels: int
    library: dict[str, str]
    kind: str
    calls: int
    ops: int
    strides: tuple[tuple[int, ...] | None, ...]
    scratch: ScratchRecord | None = None


class GraphRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host_source: str
    output_strides: tuple[tuple[int, ...] | None, ...]
    notes: tuple[str, ...]
    regions: tuple[RegionRecord, ...]


@functools.cache
def source_digest() -> str:
    """Digest of effcc's own source: another version never reads this one's records."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    rooms = ("ir", "cost_model", "passes", "codegen", "runtime", "frontend", "torch_internals")
    for path in sorted([*root.glob("*.py"), *(path for room in rooms for path in (root / room).rglob("*.py"))]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def record_key(gm: fx.GraphModule, inputs: Sequence[Any], kwargs: dict[str, Any], options: str) -> str | None:
    """Name of the graph's record: digest of the graph, its inputs' layouts, all of Inductor's settings, this machine,
    and what effcc adds. None for a graph that cannot be recorded: sizes that are symbols, ops that Inductor's cache
    does not take, or a host module that names tensors of its own."""
    if any(isinstance(item, torch.SymInt | int) for item in inputs):
        return None
    if any(node.op == "get_attr" and not is_module(gm, node) for node in gm.graph.nodes):
        return None
    key = torch_internals.code_key(gm, inputs, kwargs)
    if key is None:
        return None
    (output,) = gm.graph.find_nodes(op="output")
    parts = (
        key,
        source_digest(),
        options,
        str(torch_internals.donated_inputs() if kwargs.get("is_backward") else ()),
        str(sorted(output.meta.get("user_visible_output_idxs", ()))),
        str(torch.get_num_threads()),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_module(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(getattr(gm, str(node.target), None), fx.GraphModule)


def record_of(
    compiled: CompiledSegments, host_source: str, strides: Sequence[tuple[int, ...] | None], notes: Sequence[str]
) -> GraphRecord | None:
    """The record of a freshly compiled graph; None when a part of it is not in the code cache."""
    if compiled.fallbacks:
        return None
    regions = []
    for identity, function in compiled.functions.items():
        code, segment = compiled.code[identity], compiled.first(identity)
        inputs = [tensor_record(value) for value in code.inputs]
        key = getattr(code.run, "_fx_graph_cache_key", None)
        if key is None or any(item is None for item in inputs):
            return None
        regions.append(
            RegionRecord(
                function=function,
                identity=identity,
                key=key,
                inputs=tuple(item for item in inputs if item is not None),
                static_inputs=tuple(code.static_inputs),
                kernels=code.kernels,
                library=code.library,
                kind=segment.kind,
                calls=sum(other.identity == identity for other in compiled.segments),
                ops=len(segment.ops),
                strides=tuple(code.output_strides),
            )
        )
    if any(step is not None and not all(isinstance(part, int) for part in step) for step in strides):
        return None
    return GraphRecord(host_source, tuple(strides), tuple(notes), tuple(regions))


def with_scratch(record: GraphRecord, layouts: Mapping[str, ScratchLayout]) -> GraphRecord:
    """The record with the scratch layouts of its regions, by identity."""
    regions = [
        msgspec.structs.replace(region, scratch=ScratchRecord(dict(layout.offsets), layout.height))
        if (layout := layouts.get(region.identity)) is not None
        else region
        for region in record.regions
    ]
    return msgspec.structs.replace(record, regions=tuple(regions))


def tensor_record(value: Any) -> TensorRecord | None:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    sizes = (*value.shape, *value.stride())
    if not all(isinstance(size, int) for size in sizes):
        return None
    return TensorRecord(tuple(value.shape), tuple(value.stride()), str(value.dtype)[6:], str(value.device))


def load_regions(
    record: GraphRecord, gm: fx.GraphModule, kwargs: dict[str, Any], collector: Collector
) -> dict[str, CompiledSegment] | None:
    """The compiled code of a record's regions by function name, None when some are no longer in the code cache."""
    mode = torch_internals.fake_mode_of(gm)
    if mode is None:
        return None
    loaded: dict[str, CompiledSegment] = {}
    for region in record.regions:
        with mode:
            inputs = [
                torch.empty_strided(item.shape, item.strides, dtype=getattr(torch, item.dtype), device=item.device)
                for item in region.inputs
            ]
        settings = {**kwargs, "static_input_idxs": list(region.static_inputs)}
        collector.region = region.identity
        with torch_internals.collect_output_strides(), collecting(collector):
            run = torch_internals.load_region(region.key, gm, inputs, **settings)
        if run is None:
            return None
        source = getattr(run, "source_code", "") or ""
        loaded[region.function] = CompiledSegment(
            run, source, region.kernels, list(region.strides), region.library, inputs, list(region.static_inputs)
        )
    collector.flush(last=True)
    return loaded


def load_record(key: str) -> GraphRecord | None:
    return read_record(record_path(key), GraphRecord)


def save_record(key: str, record: GraphRecord) -> None:
    write_record(record_path(key), record)


def read_record(path: Path, kind: type[R]) -> R | None:
    """None where there is none, or it is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def write_record(path: Path, record: msgspec.Struct) -> None:
    """Replace the record in one step; a directory that cannot be written costs the next process a compilation."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(record))
        os.replace(name, path)


def record_path(key: str) -> Path:
    return torch_internals.code_cache_path() / "effcc" / key[:2] / f"{key}.json"
