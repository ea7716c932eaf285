"""Types of values in the graph: what the text form prints to the right of a colon.

A size is an ``int`` or a ``sympy.Expr`` over shape symbols (``s0``, ``2*s0 + 1``). Sizes and strides are counted in
elements, as torch does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import sympy

Size: TypeAlias = "int | sympy.Expr"

#: Short dtype names of the text form -> (torch name, bytes per element).
DTYPES: dict[str, tuple[str, int]] = {
    "f64": ("float64", 8),
    "f32": ("float32", 4),
    "bf16": ("bfloat16", 2),
    "f16": ("float16", 2),
    "f8e4m3": ("float8_e4m3fn", 1),
    "f8e5m2": ("float8_e5m2", 1),
    "f8e4m3fnuz": ("float8_e4m3fnuz", 1),
    "f8e5m2fnuz": ("float8_e5m2fnuz", 1),
    "f8e8m0": ("float8_e8m0fnu", 1),
    "c32": ("complex32", 4),
    "c64": ("complex64", 8),
    "c128": ("complex128", 16),
    "i64": ("int64", 8),
    "i32": ("int32", 4),
    "i16": ("int16", 2),
    "i8": ("int8", 1),
    "u64": ("uint64", 8),
    "u32": ("uint32", 4),
    "u16": ("uint16", 2),
    "u8": ("uint8", 1),
    "b1": ("bool", 1),
    "f4e2m1x2": ("float4_e2m1fn_x2", 1),
    "qi8": ("qint8", 1),
    "qu8": ("quint8", 1),
    "qi32": ("qint32", 4),
}

#: torch name (without ``torch.``) -> short name.
SHORT_DTYPE: dict[str, str] = {torch_name: short for short, (torch_name, _) in DTYPES.items()}


@dataclass(frozen=True)
class TensorType:
    """A strided tensor. ``stride`` is None when the layout is row-major; strides that say so become None."""

    dtype: str
    shape: tuple[Size, ...]
    device: str = "cpu"
    stride: tuple[Size, ...] | None = None

    def __post_init__(self) -> None:
        if self.stride is not None and self.stride == contiguous_stride(self.shape):
            object.__setattr__(self, "stride", None)

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def bytes(self) -> Size:
        """Bytes of the storage that the tensor spans (an expanded dimension, stride 0, costs nothing)."""
        if any(size == 0 for size in self.shape):
            return 0
        if self.stride is None:
            extent: Size = 1
            for size in self.shape:
                extent = extent * size
        else:
            extent = 1
            for size, stride in zip(self.shape, self.stride, strict=True):
                extent = extent + (size - 1) * stride
        return extent * self.element_bytes


@dataclass(frozen=True)
class ScalarType:
    """A Python number inside the graph: ``kind`` is int, float or bool; ``value`` its symbolic value when known."""

    kind: str
    value: Size | None = None


@dataclass(frozen=True)
class TupleType:
    """What a multi-output op returns; its parts are read with ``getitem``."""

    items: tuple[Type, ...]


@dataclass(frozen=True)
class NoneType:
    """An op or output position that yields nothing."""


@dataclass(frozen=True)
class OpaqueType:
    """A value that is not a tensor or number (a generator, a script object). ``name`` says which class."""

    name: str


Type: TypeAlias = "TensorType | ScalarType | TupleType | NoneType | OpaqueType"


def contiguous_stride(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """Row-major strides in elements, with torch's convention that a size of 0 counts as 1."""
    strides: list[Size] = []
    running: Size = 1
    for size in reversed(shape):
        strides.append(running)
        running = running * (1 if size == 0 else size)
    return tuple(reversed(strides))
