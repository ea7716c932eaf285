"""Numeric values of a cascade, with numpy: the reference that rewritten cascades and generated kernels are held to.

Every Einsum is evaluated over its whole iteration space at once, in the element type asked for (float64, or float32 to
see rounding). An iterative tensor is walked step by step, together with the Einsums that its recurrence passes through.
Reading outside a tensor gives NaN, so that ``where(n > 0, X[n-1], 0)`` may be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx
import numpy as np
import sympy
from numpy.typing import NDArray
from sympy.core.function import AppliedUndef

from ..errors import CascadeError
from .cascade import (
    Cascade,
    Einsum,
    Equal,
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
    Maximum,
    Minimum,
    NotEqual,
    Relu,
    Round,
    Sigmoid,
    Where,
    is_rank,
    is_size,
    ranks_of,
    tensor_name,
)

Array = NDArray[Any]

_REDUCE: dict[str, Callable[..., Array]] = {"sum": np.sum, "prod": np.prod, "max": np.max, "min": np.min}
_FUNCTIONS: dict[Any, Callable[..., Array]] = {
    sympy.exp: np.exp,
    sympy.log: np.log,
    sympy.tanh: np.tanh,
    sympy.Abs: np.abs,
    Sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    Relu: lambda x: np.maximum(x, 0),
    Round: np.round,
    Maximum: np.maximum,
    Minimum: np.minimum,
    Less: np.less,
    LessEqual: np.less_equal,
    Greater: np.greater,
    GreaterEqual: np.greater_equal,
    Equal: np.equal,
    NotEqual: np.not_equal,
    Where: lambda c, a, b: np.asarray(np.where(c != 0, a, b)),
}


@dataclass
class Space:
    """Where expressions are evaluated: ``axes`` are the ranks of the result, in order, each with its coordinates.

    ``fixed`` ranks have one coordinate; ``sizes`` hold ``|n|`` under ``n`` and named constants under their names.
    """

    axes: tuple[sympy.Symbol, ...]
    coordinates: Mapping[sympy.Symbol, Array]
    sizes: Mapping[str, int]
    fixed: Mapping[sympy.Symbol, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.coordinates[axis]) for axis in self.axes)

    def value(self, symbol: sympy.Symbol) -> Array:
        """The value of a rank variable, size or constant, broadcastable to ``shape``."""
        if is_size(symbol):
            return np.asarray(self.sizes[symbol.name.strip("|")])
        if symbol in self.fixed:
            return np.asarray(self.fixed[symbol])
        if symbol in self.coordinates and is_rank(symbol):
            extent = [1] * len(self.axes)
            extent[self.axes.index(symbol)] = -1
            return self.coordinates[symbol].reshape(extent)
        if symbol.name not in self.sizes:
            raise CascadeError(
                f"{symbol.name} has no value", where=symbol.name, remedy=f"Give it: sizes={{'{symbol.name}': ...}}."
            )
        return np.asarray(self.sizes[symbol.name])


def evaluate_expression(e: sympy.Expr, values: Mapping[sympy.Expr, Array], dtype: Any = np.float64) -> Array:
    """The value of an expression; ``values`` holds every symbol and tensor access in it, broadcastable together."""
    if e in values:
        return values[e]
    if e.is_number and not e.args:
        return np.asarray(float(e), dtype=dtype)
    if e.is_Pow:
        base = evaluate_expression(e.args[0], values, dtype)
        if e.args[1] == sympy.Rational(1, 2):
            return np.sqrt(base)
        if e.args[1] == sympy.Rational(-1, 2):
            return 1 / np.sqrt(base)
        if e.args[1].is_Integer:
            power = int(e.args[1])
            return np.asarray(base, dtype=dtype) ** power if power > 0 else 1 / np.asarray(base, dtype=dtype) ** -power
    if not e.args:
        raise CascadeError(f"{e} has no value", where=str(e))
    parts = [evaluate_expression(argument, values, dtype) for argument in e.args]
    if e.is_Add or e.is_Mul:
        total = parts[0]
        for part in parts[1:]:
            total = total + part if e.is_Add else total * part
        return total
    result = np.power(*parts) if e.is_Pow else _FUNCTIONS[e.func](*parts)
    return result.astype(dtype) if result.dtype == np.bool_ else result


def evaluate_body(e: sympy.Expr, tensors: Mapping[str, Array], space: Space, dtype: Any = np.float64) -> Array:
    """The value of an expression with tensor accesses at every point of the space, broadcastable to its shape."""
    values: dict[sympy.Expr, Array] = {}
    waiting = [e]
    while waiting:
        node = waiting.pop()
        if isinstance(node, AppliedUndef):
            values[node] = gather(tensors[tensor_name(node)], node, space)
        elif node.is_Symbol:
            values[node] = space.value(node).astype(dtype)
        else:
            waiting.extend(node.args)
    with np.errstate(all="ignore"):
        return evaluate_expression(e, values, dtype)


def gather(tensor: Array, item: AppliedUndef, space: Space) -> Array:
    """The elements that an access reads, broadcastable to the space's shape; NaN outside the tensor."""
    if not item.args:
        return tensor
    index: list[Array] = []
    outside = np.zeros((), dtype=bool)
    for position, at in enumerate(item.args):
        numbers = {symbol: space.value(symbol) for symbol in at.free_symbols}
        place = np.asarray(evaluate_expression(at, numbers, np.int64)).astype(np.int64)
        bad = (place < 0) | (place >= tensor.shape[position])
        if bad.any():
            outside = outside | bad
            place = np.clip(place, 0, max(tensor.shape[position] - 1, 0))
        index.append(place)
    if 0 in tensor.shape:
        return np.full(np.broadcast_shapes(*(place.shape for place in index)), np.nan, tensor.dtype)
    found = tensor[tuple(index)]
    return np.where(outside, np.nan, found).astype(tensor.dtype) if outside.any() else found


def reduce_body(
    e: sympy.Expr,
    reduction: str | None,
    kept: tuple[sympy.Symbol, ...],
    reduced: tuple[sympy.Symbol, ...],
    tensors: Mapping[str, Array],
    space: Space,
    dtype: Any,
) -> Array:
    """``reduction[reduced] e`` with axes ``kept``; an empty fiber gives the reduction's identity."""
    axes = (*kept, *reduced)
    whole = Space(axes, space.coordinates, space.sizes, space.fixed)
    body = np.broadcast_to(np.asarray(evaluate_body(e, tensors, whole, dtype), dtype=dtype), whole.shape)
    if reduction is None or not reduced:
        return np.array(body)
    start = {"sum": 0.0, "prod": 1.0, "max": -np.inf, "min": np.inf}[reduction]
    points = int(np.prod(whole.shape[len(kept) :], dtype=np.int64))
    flat = np.ascontiguousarray(body).reshape(*whole.shape[: len(kept)], points)
    with np.errstate(all="ignore"):
        if points == 0:
            return np.full(whole.shape[: len(kept)], start, dtype=dtype)
        return np.asarray(_REDUCE[reduction](flat, axis=-1), dtype=dtype)


def evaluate(
    cascade: Cascade, inputs: Mapping[str, Array], sizes: Mapping[str, int] | None = None, dtype: Any = np.float64
) -> dict[str, Array]:
    """The value of every tensor, inputs included.

    ``inputs`` are arrays in the order of each tensor's indices. ``sizes`` gives rank sizes that no input shows (ranks
    inside an affine index) and named constants. Raises ``CascadeError`` for a missing or contradictory input or size.
    """
    sizes = rank_sizes(cascade, inputs, sizes or {})
    tensors = {name: np.asarray(array, dtype=dtype) for name, array in inputs.items()}
    for component in _components(cascade):
        loops = {einsum.iterative for einsum in component if einsum.iterative is not None}
        if not loops:
            for einsum in component:
                tensors[einsum.output] = _whole(einsum, tensors, sizes, dtype)
        elif len(loops) == 1:
            _walk(component, next(iter(loops)), tensors, sizes, dtype)
        else:
            names = ", ".join(sorted(einsum.output for einsum in component))
            raise CascadeError(f"{names} recur over two ranks at once", where=names, remedy="Use one iterative rank.")
    return tensors


def rank_sizes(cascade: Cascade, inputs: Mapping[str, Array], given: Mapping[str, int]) -> dict[str, int]:
    """Every rank's size: as given, or as the inputs' shapes say."""
    sizes = dict(given)
    for einsum in cascade.einsums:
        for item in einsum.reads:
            name = tensor_name(item)
            if name in cascade.definitions:
                continue
            if name not in inputs:
                raise CascadeError(f"no value for the input {name}", where=name, remedy=f"Pass inputs['{name}'].")
            shape = np.shape(inputs[name])
            if len(shape) != len(item.args):
                raise CascadeError(f"{name} has {len(item.args)} ranks, the array {len(shape)}", where=name)
            for index, extent in zip(item.args, shape, strict=True):
                # A rank of a given size may walk over a part of the tensor, or beyond it (which a where() hides).
                if not (index.is_Symbol and is_rank(index)) or index.name in given:
                    continue
                if sizes.setdefault(index.name, extent) != extent:
                    raise CascadeError(f"rank {index.name} is {sizes[index.name]} and, in {name}, {extent}", where=name)
    for symbol in cascade.ranks:
        if symbol.name not in sizes:
            raise CascadeError(
                f"the size of rank {symbol.name} is not known",
                where=symbol.name,
                remedy=f"Give it: sizes={{'{symbol.name}': ...}}.",
            )
    return sizes


def _components(cascade: Cascade) -> list[list[Einsum]]:
    """Einsums grouped so that each group needs only earlier ones; a group of several is a recurrence."""
    graph = networkx.DiGraph()
    writers: dict[str, list[int]] = {}
    for position, einsum in enumerate(cascade.einsums):
        graph.add_node(position)
        writers.setdefault(einsum.output, []).append(position)
    for position, einsum in enumerate(cascade.einsums):
        for name in {tensor_name(item) for item in einsum.reads}:
            graph.add_edges_from((writer, position) for writer in writers.get(name, ()))
        if einsum.is_start:
            # A start belongs to the group of its step.
            others = [p for p in writers[einsum.output] if p != position]
            graph.add_edges_from([(position, p) for p in others] + [(p, position) for p in others])
    condensed = networkx.condensation(graph)
    order = networkx.lexicographical_topological_sort(condensed, key=lambda c: min(condensed.nodes[c]["members"]))
    return [[cascade.einsums[p] for p in sorted(condensed.nodes[c]["members"])] for c in order]


def _space(einsum: Einsum, sizes: Mapping[str, int], fixed: Mapping[sympy.Symbol, int]) -> Space:
    coordinates = {symbol: np.arange(sizes[symbol.name]) for symbol in einsum.space if symbol not in fixed}
    return Space((), coordinates, sizes, fixed)


def _whole(einsum: Einsum, tensors: Mapping[str, Array], sizes: Mapping[str, int], dtype: Any) -> Array:
    space = _space(einsum, sizes, {})
    return reduce_body(einsum.body, einsum.reduction, einsum.kept, einsum.reduced, tensors, space, dtype)


def _walk(
    component: list[Einsum], loop: sympy.Symbol, tensors: dict[str, Array], sizes: Mapping[str, int], dtype: Any
) -> None:
    """Run a recurrence: its starts, then all its Einsums at coordinate 0, 1, ... of the loop's rank."""
    for einsum in component:
        if einsum.output not in tensors:
            shape = []
            for index in einsum.indices:
                symbol = next(iter(ranks_of(index)), loop)
                shape.append(sizes[symbol.name] + (0 if index.is_Symbol else 1))
            tensors[einsum.output] = np.full(shape, np.nan, dtype=dtype)
        if einsum.is_start:
            place = tuple(slice(None) if ranks_of(index) else int(index) for index in einsum.indices)
            tensors[einsum.output][place] = _whole(einsum, tensors, sizes, dtype)
    steps = [einsum for einsum in component if not einsum.is_start]
    for einsum in steps:
        if loop not in einsum.kept:
            raise CascadeError(
                f"{einsum.output} needs all of {loop.name} inside its own recurrence",
                where=f"line {einsum.line}" if einsum.line else einsum.output,
                remedy=f"Give it the rank {loop.name}.",
            )
    for at in range(sizes[loop.name]):
        for einsum in steps:
            kept = tuple(symbol for symbol in einsum.kept if symbol != loop)
            space = _space(einsum, sizes, {loop: at})
            value = reduce_body(einsum.body, einsum.reduction, kept, einsum.reduced, tensors, space, dtype)
            place = tuple(
                int(index.xreplace({loop: sympy.Integer(at)})) if loop in ranks_of(index) else slice(None)
                for index in einsum.indices
            )
            tensors[einsum.output][place] = value
