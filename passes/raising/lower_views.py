"""Views, joins and margins: where elements are read, not what they are."""

from __future__ import annotations

from typing import Any

import sympy

from ...ir.cascade import GreaterEqual, Less, Where
from ...ir.types import Size
from .calls import Call, number
from .program import NotRaised, Program
from .registry import lowers
from .sizes import equal, simple
from .steps import Value


@lowers("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "squeeze", "unsqueeze", "view_as")
def lower_reshape(program: Program, call: Call) -> Value:
    if call.node.op == "aten.view.dtype":
        raise NotRaised("bits taken for another type")
    return program.reshape(call.value(0), call.type.shape)


@lowers("permute")
def lower_permute(program: Program, call: Call) -> Value:
    return program.permute(call.value(0), call.dims(1, "dims"))


@lowers("t", "numpy_T", "mT", "adjoint")
def lower_t(program: Program, call: Call) -> Value:
    value = call.value(0)
    if value.ndim < 2:
        return value
    if call.node.op.startswith("aten.numpy_T"):
        return program.permute(value, list(reversed(range(value.ndim))))
    return program.transpose(value)


@lowers("transpose", "swapaxes", "swapdims")
def lower_transpose(program: Program, call: Call) -> Value:
    return program.transpose(call.value(0), call.integer(1), call.integer(2))


@lowers("prims.transpose")
def lower_prims_transpose(program: Program, call: Call) -> Value:
    return program.permute(call.value(0), call.dims(1))


@lowers("expand", "expand_as", "broadcast_to")
def lower_expand(program: Program, call: Call) -> Value:
    return program.expand(call.value(0), call.type.shape)


@lowers("slice")
def lower_slice(program: Program, call: Call) -> Value:
    value = call.value(0)
    if value.ndim == 0:
        raise NotRaised("a slice of a scalar")
    dim = call.integer(1, "dim", 0) % value.ndim
    step = call.integer(4, "step", 1)
    length: Size = simple(call.type.shape[dim])
    raw = call.argument(2, "start")
    start = 0 if raw is None else call.plain(raw)
    extent = value.shape[dim]
    if not isinstance(start, int) or (start < 0 and not isinstance(extent, int)):
        raise NotRaised("a slice that begins at an unknown place")
    if isinstance(extent, int):
        start = min(max(start + extent, 0) if start < 0 else start, extent)
    if equal(length, 0):
        raise NotRaised("an empty slice")
    return program.slice(value, dim, start, length, step)


@lowers("select")
def lower_select(program: Program, call: Call) -> Value:
    return program.select(call.value(0), call.integer(1), call.integer(2))


@lowers("flip")
def lower_flip(program: Program, call: Call) -> Value:
    value = call.value(0)
    for dim in call.dims(1, "dims"):
        size = value.shape[dim % value.ndim]
        if not isinstance(size, int):
            raise NotRaised("a dimension of unknown size is turned round")
        value = program.slice(value, dim, size - 1, size, -1)
    return value


@lowers("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def lower_split(program: Program, call: Call) -> Any:
    value = call.value(0)
    dim = call.integer(2, "dim", 0) % value.ndim
    return _pieces(program, call, value, dim, drop=False)


@lowers("unbind")
def lower_unbind(program: Program, call: Call) -> Any:
    value = call.value(0)
    return _pieces(program, call, value, call.integer(1, "dim", 0) % value.ndim, drop=True)


def _pieces(program: Program, call: Call, value: Value, dim: int, drop: bool) -> tuple[Value, ...]:
    from ...ir.types import TensorType, TupleType

    types = call.node.type.items if isinstance(call.node.type, TupleType) else ()
    found, start = [], 0
    for each in types:
        if not isinstance(each, TensorType):
            raise NotRaised("a part that is no tensor")
        if drop:
            found.append(program.select(value, dim, start))
            start += 1
            continue
        length = each.shape[dim]
        if not isinstance(length, int) or length == 0:
            raise NotRaised("parts of unknown size")
        found.append(program.slice(value, dim, start, length))
        start += length
    return tuple(found)


@lowers("cat", "concat", "concatenate")
def lower_cat(program: Program, call: Call) -> Value:
    raw = call.argument(0, "tensors")
    values = [call.values.get(item.name) if hasattr(item, "name") else None for item in raw]
    parts = [value for value in values if isinstance(value, Value)]
    if len(parts) != len(values) or not parts:
        raise NotRaised("a part is not known")
    if any(part.ndim == 1 and equal(part.shape[0], 0) for part in parts) or len(parts) > 8:
        raise NotRaised("empty parts, or many")
    if any(part.dtype != call.type.dtype for part in parts):
        raise NotRaised("parts of different types")
    dim = call.integer(1, "dim", 0) % parts[0].ndim
    starts, at = [], 0
    for part in parts:
        size = part.shape[dim]
        if not isinstance(size, int):
            raise NotRaised("parts of unknown size are joined")
        starts.append(at)
        at += size
    return program.window(parts, dim, starts, at, sympy.Integer(0)) if len(parts) > 1 else parts[0]


@lowers("constant_pad_nd")
def lower_pad(program: Program, call: Call) -> Value:
    value = call.value(0)
    margins = [call.plain(item) for item in call.argument(1, "pad")]
    fill = number(call.plain(call.argument(2, "value", 0)))
    for pair in range(len(margins) // 2):
        before, after = margins[2 * pair : 2 * pair + 2]
        dim = value.ndim - 1 - pair
        size = value.shape[dim]
        if not all(isinstance(item, int) for item in (before, after, size)):
            raise NotRaised("a margin of unknown size")
        if before < 0 or after < 0:
            raise NotRaised("a negative margin")
        if before or after:
            value = program.window([value], dim, [before], before + int(size) + after, fill)
    return value


@lowers("slice_scatter")
def lower_slice_scatter(program: Program, call: Call) -> Value:
    """A tensor with one slice written over."""
    value, part = call.value(0), call.value(1)
    dim = call.integer(2, "dim", 0) % value.ndim
    size, length = value.shape[dim], part.shape[dim]
    raw = call.argument(3, "start")
    start = 0 if raw is None else call.plain(raw)
    if call.integer(5, "step", 1) != 1 or not all(isinstance(item, int) for item in (start, size, length)):
        raise NotRaised("a slice of unknown place is written")
    start = max(start + int(size), 0) if start < 0 else start
    return _written(program, value, part, dim, start, int(length))


@lowers("select_scatter")
def lower_select_scatter(program: Program, call: Call) -> Value:
    value, part = call.value(0), call.value(1)
    dim, index = call.integer(2) % value.ndim, call.integer(3)
    size = value.shape[dim]
    if not isinstance(size, int):
        raise NotRaised("a slice of unknown place is written")
    return _written(program, value, program.unsqueeze(part, dim), dim, index % size, 1)


def _written(program: Program, value: Value, part: Value, dim: int, start: int, length: int) -> Value:
    """``part`` laid over ``value`` at ``start``."""
    size = value.shape[dim]
    rest = int(size) - length
    if start in (0, rest) and rest == 1:
        column = program.slice(value, dim, length if start == 0 else 0, 1)
        pieces = (part, column) if start == 0 else (column, part)
        return program.window(pieces, dim, [0, int(pieces[0].shape[dim])], int(size), sympy.Integer(0))
    inside = program.window([part], dim, [start], int(size), sympy.Integer(0))

    def choose(e: Any, at: Any) -> sympy.Expr:
        return Where(GreaterEqual(at[dim], start), Where(Less(at[dim], start + length), e[0], e[1]), e[1])

    return program.generate(choose, value.shape, value.dtype, inside, value)


@lowers("repeat")
def lower_repeat(program: Program, call: Call) -> Value:
    value, counts = call.value(0), [call.plain(item) for item in call.argument(1, "repeats")]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise NotRaised("repeats of unknown number")
    shape = [*([1] * (len(counts) - value.ndim)), *value.shape]
    value = program.reshape(value, shape)
    outer = [item for count, size in zip(counts, shape, strict=True) for item in (1, size)]
    wide = [item for count, size in zip(counts, shape, strict=True) for item in (count, size)]
    return program.reshape(program.expand(program.reshape(value, outer), wide), call.type.shape)


@lowers("repeat_interleave.self_int")
def lower_repeat_interleave(program: Program, call: Call) -> Value:
    value, count = call.value(0), call.integer(1)
    dim = call.integer(2, "dim", 0) % value.ndim
    narrow = program.unsqueeze(value, dim + 1)
    shape = [*narrow.shape]
    shape[dim + 1] = count
    return program.reshape(program.expand(narrow, shape), call.type.shape)
