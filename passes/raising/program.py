"""The program that ops are lowered to, and the builders of its values.

A builder raises ``NotRaised`` for what has no form here; the op that asked is then left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import sympy

from ...ir.types import Size
from .axes import Axes
from .joined import map_parts, reduce_parts, slice_parts
from .sizes import equal, known_polynomial, product, simple
from .steps import Expand, Leaf, Map, Permute, Reduce, Regroup, Slice, Value, View, Window

Function = Callable[..., sympy.Expr]

#: dtype -> whether it holds floating-point numbers, and how many bits of precision it has.
PRECISION = {"f64": 53, "f32": 24, "bf16": 8, "f16": 11, "f8e4m3": 4, "f8e5m2": 3}
INTEGERS = frozenset({"i64", "i32", "i16", "i8", "u8", "u16", "u32", "u64"})


class NotRaised(Exception):
    """An op has no form as Einsums; the message says why."""


class Program:
    """Values in the order they are made."""

    def __init__(self) -> None:
        self.axes = Axes()
        self.values: list[Value] = []
        self.hint, self.line = "", 0

    def leaf(self, node: str, shape: Sequence[Size], dtype: str) -> Value:
        shape = tuple(simple(size) for size in shape)
        if not all(known_polynomial(size) for size in shape):
            raise NotRaised("a size is not a polynomial over size symbols")
        return self._add(shape, dtype, [self.axes.new(size) for size in shape], Leaf((), node))

    def map(self, function: Function, *operands: Value, dtype: str | None = None) -> Value:
        """``function(*elements)`` of broadcast operands."""
        return self.generate(lambda elements, _: function(*elements), self.broadcast_shape(operands), dtype, *operands)

    def generate(
        self,
        function: Callable[[Sequence[sympy.Expr], Sequence[sympy.Expr]], sympy.Expr],
        shape: Sequence[Size],
        dtype: str | None,
        *operands: Value,
    ) -> Value:
        """``function(elements, coordinates)`` in the given shape, to which the operands are broadcast."""
        shape = tuple(simple(size) for size in shape)
        split = map_parts(self, function, shape, dtype, operands)
        if split is not None:
            return split
        axes = [self.axes.new(size) for size in shape]
        for operand in operands:
            offset = len(shape) - operand.ndim
            for dim, own in enumerate(operand.axes):
                if own and not (
                    equal(operand.shape[dim], shape[offset + dim]) and self.axes.unify(axes[offset + dim], own)
                ):
                    raise NotRaised("dimensions of different sizes, or split in different ways, are walked together")
        _check_meaning(function, operands, shape)
        return self._add(shape, dtype or operands[0].dtype, axes, Map(operands, function))

    def broadcast_shape(self, operands: Sequence[Value]) -> tuple[Size, ...]:
        ndim = max((operand.ndim for operand in operands), default=0)
        shape: list[Size] = [1] * ndim
        for operand in operands:
            for dim, size in enumerate(operand.shape, start=ndim - operand.ndim):
                if not equal(size, 1):
                    shape[dim] = size
        return tuple(shape)

    def reduce(self, kind: str, value: Value, dims: Sequence[int] | None = None, keepdim: bool = False) -> Value:
        """Reduce ``dims`` (all, if None or empty)."""
        dims = tuple(sorted(dim % value.ndim for dim in dims)) if dims else tuple(range(value.ndim))
        if kind in ("max", "min") and any(value.shape[dim] == 0 for dim in dims):
            raise NotRaised("the maximum of nothing")
        split = reduce_parts(self, kind, value, dims, keepdim)
        if split is not None:
            return split
        if not any(value.axes[dim] for dim in dims):
            # A reduction over dimensions of size 1 changes nothing.
            kept = [1 if dim in dims else size for dim, size in enumerate(value.shape) if keepdim or dim not in dims]
            return self.reshape(value, kept)
        shape = [1 if dim in dims else size for dim, size in enumerate(value.shape) if keepdim or dim not in dims]
        axes = [() if dim in dims else own for dim, own in enumerate(value.axes) if keepdim or dim not in dims]
        return self._add(shape, value.dtype, axes, Reduce((value,), kind, dims))

    def reshape(self, value: Value, shape: Sequence[Size]) -> Value:
        shape = tuple(simple(size) for size in shape)
        if shape == value.shape:
            return value
        if any(equal(size, 0) for size in value.shape):
            raise NotRaised("an empty tensor is reshaped")
        if not equal(product(shape), product(value.shape)):
            raise NotRaised("a reshape whose sizes do not multiply to the same number")
        axes = [self.axes.new(size) for size in shape]
        if not self.axes.unify([f for own in axes for f in own], [f for own in value.axes for f in own]):
            raise NotRaised("a reshape that no common factors of dimensions express")
        return self._add(shape, value.dtype, axes, Regroup((value,)))

    def permute(self, value: Value, dims: Sequence[int]) -> Value:
        dims = tuple(dim % value.ndim for dim in dims)
        if dims == tuple(range(value.ndim)):
            return value
        shape, axes = [value.shape[dim] for dim in dims], [value.axes[dim] for dim in dims]
        return self._add(shape, value.dtype, axes, Permute((value,), dims))

    def transpose(self, value: Value, first: int = -1, second: int = -2) -> Value:
        dims = list(range(value.ndim))
        dims[first], dims[second] = dims[second], dims[first]
        return self.permute(value, dims)

    def unsqueeze(self, value: Value, dim: int) -> Value:
        dim = dim % (value.ndim + 1)
        return self.reshape(value, (*value.shape[:dim], 1, *value.shape[dim:]))

    def expand(self, value: Value, shape: Sequence[Size]) -> Value:
        offset = len(shape) - value.ndim
        sizes: list[Size] = []
        for dim, size in enumerate(shape):
            kept = dim >= offset and isinstance(size, int) and size == -1
            sizes.append(value.shape[dim - offset] if kept else simple(size))
        if tuple(sizes) == value.shape:
            return value
        axes = []
        for dim, size in enumerate(sizes):
            own = value.axes[dim - offset] if dim >= offset else ()
            axes.append(own or self.axes.new(size))
        return self._add(sizes, value.dtype, axes, Expand((value,)))

    def slice(self, value: Value, dim: int, start: int, length: Size, step: int = 1) -> Value:
        dim = dim % value.ndim
        if equal(length, value.shape[dim]) and step == 1:
            return value
        inside = slice_parts(self, value, dim, start, length) if step == 1 else None
        if inside is not None:
            return inside
        shape = [*value.shape]
        shape[dim] = length
        axes = [*value.axes]
        axes[dim] = self.axes.new(length)
        return self._add(shape, value.dtype, axes, Slice((value,), dim, start, step))

    def select(self, value: Value, dim: int, index: int) -> Value:
        dim = dim % value.ndim
        size = value.shape[dim]
        if index < 0:
            if not isinstance(size, int):
                raise NotRaised("an element counted from the end of a dimension of unknown size")
            index += size
        one = self.slice(value, dim, index, 1)
        return self.reshape(one, [s for at, s in enumerate(one.shape) if at != dim])

    def window(self, parts: Sequence[Value], dim: int, starts: Sequence[int], size: int, fill: sympy.Expr) -> Value:
        """Parts laid along a dimension (see ``Window``)."""
        first = parts[0]
        dim = dim % first.ndim
        shape = [*first.shape]
        shape[dim] = size
        axes = [*first.axes]
        axes[dim] = self.axes.new(size)
        for part in parts:
            for other in range(first.ndim):
                if other != dim and not (
                    equal(part.shape[other], first.shape[other]) and self.axes.unify(axes[other], part.axes[other])
                ):
                    raise NotRaised("parts of different sizes are joined")
            if not isinstance(part.shape[dim], int):
                raise NotRaised("parts of unknown size are joined")
        return self._add(shape, first.dtype, axes, Window(tuple(parts), dim, tuple(starts), fill))

    def contract(self, left: Value, right: Value) -> Value:
        """``[..., m, d] @ [..., d, n]``, batch dimensions broadcast."""
        return self.inner(self.unsqueeze(left, -2), self.unsqueeze(self.transpose(right), -3))

    def inner(self, left: Value, right: Value) -> Value:
        """The sum of products along the last dimension, the others broadcast."""
        return self.reduce("sum", self.map(lambda a, b: a * b, left, right), [-1])

    def cast(self, value: Value, dtype: str) -> Value:
        """Another element type, where that changes no number (or rounds it, which a kernel need not do)."""
        if dtype == value.dtype:
            return value
        exact_integer = value.dtype == "b1" or (value.dtype in INTEGERS and dtype in INTEGERS)
        if dtype == "b1":
            from ...ir.cascade import NotEqual

            return self.map(lambda x: NotEqual(x, sympy.Integer(0)), value, dtype="b1")
        if exact_integer or dtype in PRECISION:
            return self.map(lambda x: x, value, dtype=dtype)
        raise NotRaised(f"a conversion of {value.dtype} to {dtype} drops fractions")

    def _add(self, shape: Sequence[Size], dtype: str, axes: Sequence[tuple[int, ...]], step: object) -> Value:
        assert isinstance(step, Leaf | Map | Reduce | View | Window)
        value = Value(len(self.values), tuple(shape), dtype, tuple(axes), step, self.hint, self.line)
        self.values.append(value)
        return value


def _check_meaning(function: Callable[..., sympy.Expr], operands: Sequence[Value], shape: Sequence[Size]) -> None:
    """Refuse a map in which sympy cancels an operand: ``x * 0`` is not 0 where x is infinite or NaN."""
    symbols = [_symbol(f"x{number}", real=True) for number in range(len(operands))]
    coordinates = [_symbol(f"c{number}", integer=True) for number in range(len(shape))]
    made = function(symbols, coordinates)
    if not set(symbols) <= made.free_symbols or made.has(sympy.zoo):
        raise NotRaised("an operand cancels")


@functools.cache
def _symbol(name: str, **assumed: bool) -> sympy.Symbol:
    return sympy.Symbol(name, **assumed)
