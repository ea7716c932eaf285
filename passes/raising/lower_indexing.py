"""Reading and writing at places that an index tensor names, as sums over a predicate.

``gather``: ``Y[t] = sum[v] where(v == I[t], X[t,v], 0)``; its gradient is ``DX[t,v] = where(v == I[t], DY[t], 0)``.
Of all v at most one holds, so a kernel may read (or add to) that element alone.
"""

from __future__ import annotations

from typing import Any

import sympy

from ...ir.cascade import Equal, NotEqual, Where
from .calls import Call, number
from .lower_pointwise import ZERO
from .program import INTEGERS, NotRaised, Program
from .registry import lowers
from .sizes import equal
from .steps import Map, Value


def is_index(value: Value) -> Value:
    if value.dtype not in INTEGERS:
        raise NotRaised("an index that is no integer tensor")
    return value


def pick(program: Program, source: Value, index: Value) -> Value:
    """``sum[v] where(v == index, source, 0)`` over the last dimension of ``source``; the others are broadcast with
    those of ``index``."""
    narrow = program.unsqueeze(index, -1)
    shape = program.broadcast_shape([source, narrow])
    chosen = program.generate(lambda e, at: Where(Equal(at[-1], e[1]), e[0], ZERO), shape, source.dtype, source, narrow)
    return program.reduce("sum", chosen, [-1])


@lowers("gather")
def lower_gather(program: Program, call: Call) -> Value:
    value, dim, index = call.value(0), call.integer(1), is_index(call.value(2))
    if value.ndim == 0 or index.ndim != value.ndim:
        raise NotRaised("a gather from a scalar")
    dim = dim % value.ndim
    for other in range(value.ndim):
        if other != dim and not equal(value.shape[other], index.shape[other]):
            raise NotRaised("a gather from a part of a tensor")
    order = [*(d for d in range(value.ndim) if d != dim), dim]
    last = program.permute(value, order)
    shape = [size if d != dim else 1 for d, size in enumerate(value.shape)]
    return pick(program, program.reshape(last, [*shape, value.shape[dim]]), index)


@lowers("embedding")
def lower_embedding(program: Program, call: Call) -> Value:
    weight, index = call.value(0), is_index(call.value(1))
    return _rows(program, weight, index)


@lowers("index_select")
def lower_index_select(program: Program, call: Call) -> Value:
    value, dim, index = call.value(0), call.integer(1), is_index(call.value(2))
    if index.ndim != 1:
        raise NotRaised("an index with dimensions")
    dim = dim % value.ndim
    order = [dim, *(d for d in range(value.ndim) if d != dim)]
    rows = _rows(program, program.permute(value, order), index)
    back = [order.index(d) for d in range(value.ndim)]
    return program.permute(rows, back)


@lowers("index.Tensor")
def lower_index(program: Program, call: Call) -> Value:
    """``x[index]`` with one index tensor, for the first dimension. A negative index counts from the end."""
    value = call.value(0)
    indices = call.argument(1)
    if not isinstance(indices, tuple) or len(indices) != 1 or not hasattr(indices[0], "name"):
        raise NotRaised("several index tensors")
    index = call.values.get(indices[0].name)
    if not isinstance(index, Value):
        raise NotRaised("an index that is no tensor of numbers")
    return _rows(program, value, _from_the_front(program, is_index(index), value))


def _from_the_front(program: Program, index: Value, value: Value) -> Value:
    size = number(value.shape[0])
    from ...ir.cascade import Less

    return program.map(lambda i: Where(Less(i, ZERO), i + size, i), index)


def _rows(program: Program, table: Value, index: Value) -> Value:
    """``table[index]``: dimensions of the index, then the table's but the first."""
    order = [*range(1, table.ndim), 0]
    columns = program.permute(table, order)
    inner = table.ndim - 1
    wide = program.reshape(index, [*index.shape, *([1] * inner)])
    return pick(program, columns, wide)


@lowers("scatter.value", "scatter.src", "scatter_add")
def lower_scatter(program: Program, call: Call) -> Value:
    """One element a row is written, ``where(v == I[t], source, X[t,v])``, or added to,
    ``X[t,v] + where(v == I[t], source, 0)``."""
    value, dim, index = call.value(0), call.integer(1), is_index(call.value(2))
    dim = dim % value.ndim
    for other in range(value.ndim):
        wanted = 1 if other == dim else value.shape[other]
        if not equal(index.shape[other], wanted):
            raise NotRaised("more than one element of a row is written")
    if call.node.op == "aten.scatter.value":
        source = number(call.plain(call.argument(3, "value")))
        return program.generate(
            lambda e, at: Where(Equal(at[dim], e[1]), source, e[0]), value.shape, value.dtype, value, index
        )
    given = call.value(3, "src")
    if not all(equal(a, b) for a, b in zip(given.shape, index.shape, strict=True)):
        raise NotRaised("more is given than written")
    if call.node.op == "aten.scatter_add.default":
        added = program.generate(
            lambda e, at: Where(Equal(at[dim], e[0]), e[1], ZERO), value.shape, value.dtype, index, given
        )
        return added if _is_zero(value) else program.map(lambda x, y: x + y, value, added)
    return program.generate(
        lambda e, at: Where(Equal(at[dim], e[1]), e[2], e[0]), value.shape, value.dtype, value, index, given
    )


@lowers("embedding_dense_backward")
def lower_embedding_backward(program: Program, call: Call) -> Value:
    gradient, index = call.value(0), is_index(call.value(1))
    padding = call.number(3, "padding_idx", -1)
    if call.flag(4, "scale_grad_by_freq"):
        raise NotRaised("gradients scaled by frequency")
    rows, width = call.type.shape
    tokens = program.reshape(index, [1, *index.shape, 1])
    spread = program.reshape(gradient, [1, *gradient.shape])
    shape = [rows, *index.shape, width]

    def chosen(e: Any, at: Any) -> sympy.Expr:
        value = Where(Equal(at[0], e[1]), e[0], ZERO)
        return value if padding < 0 else Where(NotEqual(at[0], padding), value, ZERO)

    terms = program.generate(chosen, shape, gradient.dtype, spread, tokens)
    return program.reduce("sum", terms, list(range(1, 1 + index.ndim)))


@lowers("_unsafe_masked_index_put_accumulate", "index_put", "_unsafe_index_put")
def lower_index_put(program: Program, call: Call) -> Value:
    """Rows added at the places of one index tensor: ``X[v] + sum[t] where(v == I[t], S[t], 0)``."""
    masked = call.node.op.startswith("aten._unsafe_masked")
    value = call.value(0)
    mask = call.optional(1) if masked else None
    indices = call.argument(2 if masked else 1)
    source = call.value(3 if masked else 2)
    if not masked and not call.flag(3, "accumulate"):
        raise NotRaised("elements are written over each other")
    if not isinstance(indices, tuple) or len(indices) != 1 or not hasattr(indices[0], "name"):
        raise NotRaised("several index tensors")
    index = call.values.get(indices[0].name)
    if not isinstance(index, Value):
        raise NotRaised("an index that is no tensor of numbers")
    index = _from_the_front(program, is_index(index), value)
    rows, columns = value.shape[0], value.shape[1:]
    if source.ndim != index.ndim + len(columns):
        source = program.expand(source, [*index.shape, *columns])
    spread = program.reshape(source, [1, *source.shape])
    tail = [1] * len(columns)
    places = program.reshape(index, [1, *index.shape, *tail])
    parts = [spread, places]
    if mask is not None:
        if mask.ndim not in (index.ndim, source.ndim):
            raise NotRaised("a mask of another shape")
        parts.append(program.reshape(mask, [1, *mask.shape, *(tail if mask.ndim == index.ndim else ())]))

    def chosen(e: Any, at: Any) -> sympy.Expr:
        found = Where(Equal(at[0], e[1]), e[0], ZERO)
        return Where(e[2], found, ZERO) if len(e) > 2 else found

    terms = program.generate(chosen, [rows, *index.shape, *columns], value.dtype, *parts)
    total = program.reduce("sum", terms, list(range(1, 1 + index.ndim)))
    return total if _is_zero(value) else program.map(lambda x, s: x + s, value, total)


def _is_zero(value: Value) -> bool:
    """Whether a value is 0 everywhere, as what gradients are added to is."""
    step = value.step
    return isinstance(step, Map) and not step.operands and step.function([], [ZERO] * value.ndim) == 0
