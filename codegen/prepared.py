"""A cascade lowered for a machine: its tile programs, and the tensors that they work on. What the printers of tile
programs, C++ and Triton, start from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import ShapeError
from ..ir.cascade import Cascade, accesses, is_rank
from ..ir.tile import Program
from ..passes.rewrite_cascade import Rewriting, rewrite
from .tiles.errors import NotLowerable
from .tiles.lower import Operand, Settings, lower
from .tiles.roles import Machine

#: Element types of kernels -> torch's.
TORCH_DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "b1": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """How a tensor lies in memory: shape, element type, and which dimension has stride 1 (None: not known)."""

    shape: tuple[int, ...]
    dtype: str
    unit: int | None


@dataclass(frozen=True)
class Prepared:
    """``programs`` in launch order; ``sizes`` of all their ranks; ``shapes`` of all their tensors. ``buffers`` lie
    between two launches."""

    programs: tuple[Program, ...]
    sizes: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]]
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    buffers: Mapping[str, TensorInfo]


def prepared(
    cascade: Cascade | Rewriting,
    sizes: Mapping[str, int],
    dtypes: Mapping[str, str] | str,
    outputs: Sequence[str] | None,
    units: Mapping[str, int | None] | None,
    shapes: Mapping[str, Sequence[int]] | None,
    wide: frozenset[str],
    *,
    machine: Machine,
    crossing: bool,
    splitting: bool,
    exact: bool = False,
) -> Prepared:
    """Arguments as of ``cascade_kernel.prepare_cascade``. Raises ``NotLowerable`` with the reason."""
    rewriting = cascade if isinstance(cascade, Rewriting) else rewrite(cascade)
    wanted = wanted_outputs(cascade, outputs)
    given = {name: dtypes if isinstance(dtypes, str) else dtypes.get(name) for name in rewriting.cascade.tensors}
    infos = _infos(rewriting.cascade, sizes, given, units or {}, shapes or {}, wanted)
    compute = "f64" if exact or any(info.dtype == "f64" for info in infos.values()) else "f32"
    operands = {name: Operand(info.dtype, info.unit) for name, info in infos.items()}
    settings = Settings(sizes, operands, compute, wide, machine, crossing, splitting)
    lowered = lower(rewriting.cascade, rewriting.monoids, wanted, settings)
    full = {**sizes, **lowered.sizes}
    own = dict(full)
    all_shapes: dict[str, Sequence[int]] = {name: info.shape for name, info in infos.items()}
    buffers: dict[str, TensorInfo] = {}
    for program in lowered.programs:
        for item in program.tensors:
            if item.name not in infos:
                shape = tuple(own[rank.name] for rank in item.ranks)
                buffers[item.name] = TensorInfo(shape, item.dtype, item.unit)
                all_shapes[item.name] = shape
            full.update({rank.name: extent for rank, extent in zip(item.ranks, all_shapes[item.name], strict=True)})
    inputs = {name: info for name, info in infos.items() if name not in wanted}
    return Prepared(lowered.programs, full, all_shapes, inputs, {name: infos[name] for name in wanted}, buffers)


def wanted_outputs(cascade: Cascade | Rewriting, outputs: Sequence[str] | None) -> tuple[str, ...]:
    """The outputs given, or the cascade's."""
    written = cascade if isinstance(cascade, Cascade) else cascade.cascade
    return tuple(outputs if outputs is not None else written.outputs)


def _infos(
    cascade: Cascade,
    sizes: Mapping[str, int],
    dtypes: Mapping[str, str | None],
    units: Mapping[str, int | None],
    shapes: Mapping[str, Sequence[int]],
    wanted: Sequence[str],
) -> dict[str, TensorInfo]:
    """Every input's and output's place in memory."""
    wide = any(dtypes.get(name) == "f64" for name in cascade.inputs)
    found: dict[str, TensorInfo] = {}
    for einsum in cascade.einsums:
        for item in accesses(einsum.body):
            name = str(item.func.__name__)
            if name in cascade.definitions or name in found:
                continue
            shape = shapes.get(name) or [_extent(name, index, sizes) for index in item.args]
            unit = units.get(name, len(shape) - 1 if shape else None)
            found[name] = TensorInfo(tuple(shape), dtypes.get(name) or "f32", unit)
    for name in wanted:
        if name not in cascade.definitions:
            raise NotLowerable(f"the rewritten cascade does not compute {name}", where=name)
        shape = [sizes[symbol.name] for symbol in cascade.definitions[name].kept]
        dtype = dtypes.get(name) or ("f64" if wide else "f32")
        found[name] = TensorInfo(tuple(shape), dtype, units.get(name, len(shape) - 1 if shape else None))
    return found


def _extent(name: str, index: object, sizes: Mapping[str, int]) -> int:
    symbol = getattr(index, "name", None)
    if symbol is None or symbol not in sizes or not is_rank(index):
        raise NotLowerable(f"the shape of {name}, read at {index}, is not known", where=name)
    return sizes[symbol]


def checked(name: str, tensor: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    if tuple(tensor.shape) != info.shape or tensor.dtype != TORCH_DTYPES[info.dtype]:
        found = f"{DTYPE_NAMES.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)}"
        raise ShapeError(
            f"{name} is {found}; the kernel was made for {info.dtype}{list(info.shape)}",
            where=name,
            remedy="Compile the cascade for these sizes.",
        )
    if info.unit is not None and tensor.shape[info.unit] > 1 and tensor.stride(info.unit) != 1:
        raise ShapeError(
            f"the elements of {name} are not neighbours along dimension {info.unit}",
            where=name,
            remedy="Compile with units={name: None}, or make the tensor contiguous.",
        )
    return tensor
