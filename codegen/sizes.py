"""Sizes that may be symbols, read without telling torch to guard on their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def size_hint(size: Any) -> int | None:
    """A size as a number; a symbol's is the one that it was traced with, None where only the data gives it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint if size.node.has_hint() else None
    return int(hint) if hint is not None else None


def size_hints(sizes: Sequence[Any]) -> tuple[int, ...] | None:
    """All sizes as numbers, None where one is not known."""
    hints = tuple(size_hint(size) for size in sizes)
    return None if None in hints else hints  # type: ignore[return-value]


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same expression."""
    return str(a) == str(b)


def storage_bytes(value: torch.Tensor) -> int:
    """Bytes that a tensor's elements span, 0 where a size is not known."""
    shape, strides = size_hints(value.shape), size_hints(value.stride())
    if shape is None or strides is None or 0 in shape:
        return 0
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    return extent * value.element_size()
