"""Types as text: what stands behind a value's colon."""

from __future__ import annotations

import re

from .expressions import print_expression
from .text import quote
from .types import NoneType, OpaqueType, ScalarType, TensorType, TupleType, Type

PLAIN_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
PLAIN_DEVICE = re.compile(r"[a-z]+(:[0-9]+)?\Z")


def print_type(value: Type) -> str:
    """``bf16[8,s0]``, with ``{strides}`` if not contiguous, ``@device`` if not cpu; ``int(s0)``; ``(f32[2], none)``."""
    if isinstance(value, TensorType):
        text = f"{value.dtype}[{','.join(map(print_expression, value.shape))}]"
        if value.stride is not None:
            text += "{" + ",".join(map(print_expression, value.stride)) + "}"
        return text if value.device == "cpu" else f"{text}@{plain(value.device, PLAIN_DEVICE)}"
    if isinstance(value, ScalarType):
        kind = plain(value.kind, PLAIN_WORD)
        return kind if value.value is None else f"{kind}({print_expression(value.value)})"
    if isinstance(value, TupleType):
        items = ", ".join(map(print_type, value.items))
        return f"({items},)" if len(value.items) == 1 else f"({items})"
    if isinstance(value, NoneType):
        return "none"
    if isinstance(value, OpaqueType):
        return f"opaque({quote(value.name)})"
    raise TypeError(f"a type of class {type(value).__name__} has no text form: {value!r}")


def plain(text: str, pattern: re.Pattern[str]) -> str:
    return text if pattern.match(text) else quote(text)
