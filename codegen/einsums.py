"""Einsums of a cascade on torch tensors, one after the other: what runs where no kernel can be compiled, and what one
device computes of a pipeline's output layer.

A sum of products is contracted with ``torch.einsum``, so that ``sum[v] exp(Z[t,v] - MX[t]) * W[v,d]`` is one matrix
product; a product with ``where(v == T[t], 1, 0)`` is a lookup of the row T[t].
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from ..errors import CascadeError
from ..ir.cascade import (
    Cascade,
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
    tensor_name,
)

_FUNCTIONS: Mapping[Any, Callable[..., torch.Tensor]] = {
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.tanh: torch.tanh,
    sympy.Abs: torch.abs,
    Sigmoid: torch.sigmoid,
    Relu: torch.relu,
    Round: torch.round,
    Maximum: torch.maximum,
    Minimum: torch.minimum,
    Less: torch.lt,
    LessEqual: torch.le,
    Greater: torch.gt,
    GreaterEqual: torch.ge,
    Equal: torch.eq,
    NotEqual: torch.ne,
    Where: lambda condition, yes, no: torch.where(condition != 0, yes, no),
}
_REDUCTIONS: Mapping[str, Callable[..., torch.Tensor]] = {
    "max": torch.amax,
    "min": torch.amin,
    "prod": lambda tensor, axes: tensor.flatten(axes[0]).prod(axes[0]),
}
_IDENTITIES = {"max": float("-inf"), "min": float("inf"), "prod": 1.0}
_POWERS: Mapping[sympy.Expr, Callable[[torch.Tensor], torch.Tensor]] = {
    sympy.Integer(-1): torch.reciprocal,
    sympy.Rational(1, 2): torch.sqrt,
    sympy.Rational(-1, 2): torch.rsqrt,
}


@dataclass(frozen=True)
class Values:
    """``tensors`` by name, computed with in ``dtype``. ``first``: the first coordinate of a rank that is split over
    devices (0 for others); ``sizes``: sizes of whole ranks, and named constants. ``extents``: sizes of ranks here,
    where no tensor shows them."""

    tensors: Mapping[str, torch.Tensor]
    first: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    extents: Mapping[str, int] = field(default_factory=dict)

    def with_tensors(self, more: Mapping[str, torch.Tensor]) -> Values:
        return Values({**self.tensors, **more}, self.first, self.sizes, self.extents)

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise CascadeError(f"{name} has no value", where=name, remedy="give the tensor")
        return self.tensors[name]

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating-point type of the tensors, float32 at least."""
        found = torch.float32
        for tensor in self.tensors.values():
            if tensor.is_floating_point():
                found = torch.promote_types(found, tensor.dtype)
        return found

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


def run_cascade(cascade: Cascade, values: Values) -> dict[str, torch.Tensor]:
    """Every tensor that the cascade writes, in ``values.dtype``. Raises CascadeError for one with an iterative rank."""
    for einsum in cascade.einsums:
        if einsum.iterative is not None:
            raise CascadeError(f"{einsum.output} recurs over {einsum.iterative}", where=einsum.output)
        result = reduce(einsum.body, einsum.reduction, einsum.kept, einsum.reduced, values)
        values = values.with_tensors({einsum.output: result})
    return {name: values.tensors[name] for name in cascade.definitions}


def reduce(
    body: sympy.Expr,
    reduction: str | None,
    kept: Sequence[sympy.Symbol],
    reduced: Sequence[sympy.Symbol],
    values: Values,
) -> torch.Tensor:
    """``reduction[reduced] body`` with axes ``kept``, on the coordinates that the tensors here have."""
    extents = _extents(body, (*kept, *reduced), values)
    if reduction is None or not reduced:
        return _full(evaluate(body, kept, values, extents), kept, extents)
    if reduction != "sum":
        axes = (*kept, *reduced)
        whole = _full(evaluate(body, axes, values, extents), axes, extents)
        if 0 in whole.shape[len(kept) :]:
            return whole.new_full(whole.shape[: len(kept)], _IDENTITIES[reduction])
        return _REDUCTIONS[reduction](whole, tuple(range(len(kept), len(axes))))
    total: torch.Tensor | None = None
    for term in sympy.Add.make_args(sympy.expand_mul(body, deep=False) if body.is_Add else body):
        part = _contract(term, kept, reduced, values, extents)
        total = part if total is None else total + part
    assert total is not None
    return total


def evaluate(
    e: sympy.Expr, axes: Sequence[sympy.Symbol], values: Values, extents: Mapping[sympy.Symbol, int]
) -> torch.Tensor:
    """The value of an expression at every point of the axes, broadcastable to them. Raises CascadeError for a function
    or tensor that is not known."""
    dtype = values.dtype
    if isinstance(e, AppliedUndef):
        return _read(values.tensor(tensor_name(e)), e, axes, values, extents).to(dtype)
    if e.is_Symbol:
        return _symbol(e, axes, values, extents).to(dtype)
    if not e.args:
        return torch.full((), float(e), dtype=dtype, device=values.device)
    if e.is_Pow and e.args[1] in _POWERS:
        return _POWERS[e.args[1]](evaluate(e.args[0], axes, values, extents))
    parts = [evaluate(argument, axes, values, extents) for argument in e.args]
    if e.is_Add or e.is_Mul:
        result = parts[0]
        for part in parts[1:]:
            result = result + part if e.is_Add else result * part
        return result
    if e.is_Pow:
        return torch.pow(*parts)
    if e.func not in _FUNCTIONS:
        raise CascadeError(f"{e.func} has no value here", where=str(e), remedy="Report it.")
    return _FUNCTIONS[e.func](*parts).to(dtype)


def _contract(
    term: sympy.Expr,
    kept: Sequence[sympy.Symbol],
    reduced: Sequence[sympy.Symbol],
    values: Values,
    extents: Mapping[sympy.Symbol, int],
) -> torch.Tensor:
    """``sum[reduced]`` of a product: factors with the same axes multiplied, the groups contracted."""
    factors = list(sympy.Mul.make_args(term))
    axes = (*kept, *reduced)
    indicator = next((each for each in factors if _indicator(each, reduced)), None)
    if indicator is not None:
        rest = sympy.Mul(indicator.args[1], *(factor for factor in factors if factor is not indicator))
        return _lookup(indicator, rest, kept, values, extents)
    groups: dict[tuple[sympy.Symbol, ...], list[sympy.Expr]] = {}
    for factor in factors:
        own = tuple(axis for axis in axes if axis in _axes_of(factor))
        groups.setdefault(own, []).append(factor)
    # A factor whose axes lie in another group's is multiplied there, the smallest that has them.
    for own in sorted(groups, key=len):
        hosts = [other for other in groups if other != own and set(own) <= set(other)]
        if hosts:
            groups[min(hosts, key=len)] += groups.pop(own)
    letters = dict(zip(axes, string.ascii_letters, strict=False))
    operands, inputs = [], []
    for own, items in groups.items():
        operands.append(_full(evaluate(sympy.Mul(*items, evaluate=False), own, values, extents), own, extents))
        inputs.append("".join(letters[axis] for axis in own))
    covered = {axis for own in groups for axis in own}
    if missing := [axis for axis in axes if axis not in covered]:
        operands.append(operands[0].new_ones([extents[axis] for axis in missing]))
        inputs.append("".join(letters[axis] for axis in missing))
    return torch.einsum(f"{','.join(inputs)}->{''.join(letters[axis] for axis in kept)}", *operands)


def _indicator(e: sympy.Expr, reduced: Sequence[sympy.Symbol]) -> bool:
    """Whether it is 0 but at one coordinate of a reduced rank, which a tensor names."""
    if not isinstance(e, Where) or not isinstance(e.args[0], Equal) or e.args[2] != 0:
        return False
    left, right = e.args[0].args
    named = isinstance(right, AppliedUndef) and all(index.is_Symbol for index in right.args)
    return len(reduced) == 1 and left == reduced[0] and named


def _lookup(
    indicator: sympy.Expr,
    rest: sympy.Expr,
    kept: Sequence[sympy.Symbol],
    values: Values,
    extents: Mapping[sympy.Symbol, int],
) -> torch.Tensor:
    """``sum[v] where(v == T[t], a, 0) * b`` is ``rest``, a * b, at v = T[t], or 0 where that lies elsewhere."""
    rank, named = indicator.args[0].args
    place = values.tensor(tensor_name(named)).long() - values.first.get(rank.name, 0)
    inside = (place >= 0) & (place < extents[rank])
    place = torch.where(inside, place, 0)
    own = tuple(axis for axis in kept if axis in _axes_of(rest))
    if rank not in _axes_of(rest) or set(named.args) & set(own):
        shape = [extents[axis] if axis in named.args else 1 for axis in kept]
        along = [named.args.index(axis) for axis in kept if axis in named.args]
        inside, place = (each.permute(along).reshape(shape) for each in (inside, place))
        if rank not in _axes_of(rest):
            picked = _full(evaluate(rest, kept, values, extents), kept, extents)
        else:
            whole = _full(evaluate(rest, (*kept, rank), values, extents), (*kept, rank), extents)
            picked = whole.gather(-1, _full(place, kept, extents).unsqueeze(-1)).squeeze(-1)
        return torch.where(inside, picked, 0)
    table = _full(evaluate(rest, (rank, *own), values, extents), (rank, *own), extents)
    rows = table[place] * inside.reshape(*inside.shape, *(1,) * len(own)).to(table.dtype)
    found = (*named.args, *own)
    whole = rows.reshape(*rows.shape, *(1 for axis in kept if axis not in found))
    order = (*found, *(axis for axis in kept if axis not in found))
    return _full(whole.permute(*(order.index(axis) for axis in kept)), kept, extents)


def _axes_of(e: sympy.Expr) -> set[sympy.Symbol]:
    return {symbol for symbol in e.free_symbols if is_rank(symbol)}


def _symbol(
    e: sympy.Symbol, axes: Sequence[sympy.Symbol], values: Values, extents: Mapping[sympy.Symbol, int]
) -> torch.Tensor:
    name = e.name.strip("|")
    if is_size(e) or e not in extents:
        if name not in values.sizes:
            raise CascadeError(f"{e} has no value", where=name, remedy="give its size")
        return torch.tensor(values.sizes[name], device=values.device)
    shape = [extents[e] if axis == e else 1 for axis in axes]
    return (values.first.get(name, 0) + torch.arange(extents[e], device=values.device)).reshape(shape)


def _read(
    tensor: torch.Tensor,
    item: AppliedUndef,
    axes: Sequence[sympy.Symbol],
    values: Values,
    extents: Mapping[sympy.Symbol, int],
) -> torch.Tensor:
    """The elements that an access reads, with ``axes`` of size 1 where it has none; NaN outside the tensor."""
    indices = list(item.args)
    plain = len(set(indices)) == len(indices) and all(
        index in extents and extents[index] <= size for index, size in zip(indices, tensor.shape, strict=True)
    )
    if plain:
        for dimension, index in enumerate(indices):
            tensor = tensor.narrow(dimension, 0, extents[index])
        tensor = tensor.permute([indices.index(axis) for axis in axes if axis in indices])
        return tensor.reshape([extents[axis] if axis in indices else 1 for axis in axes])
    places, outside = [], torch.zeros((), dtype=torch.bool, device=tensor.device)
    for index, size in zip(indices, tensor.shape, strict=True):
        place = _whole_number(index, axes, values, extents)
        outside = outside | (place < 0) | (place >= size)
        places.append(place.clamp(0, max(size - 1, 0)))
    found = tensor[tuple(places)]
    return torch.where(outside, float("nan"), found) if bool(outside.any()) else found


def _whole_number(
    e: sympy.Expr, axes: Sequence[sympy.Symbol], values: Values, extents: Mapping[sympy.Symbol, int]
) -> torch.Tensor:
    """An affine index at every point of the axes."""
    total = torch.zeros([1] * len(axes), dtype=torch.int64, device=values.device)
    for term in sympy.Add.make_args(sympy.expand(e)):
        factor = torch.ones_like(total)
        for part in sympy.Mul.make_args(term):
            factor = factor * (int(part) if part.is_Integer else _symbol(part, axes, values, extents).long())
        total = total + factor
    return total


def _full(tensor: torch.Tensor, axes: Sequence[sympy.Symbol], extents: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    return tensor.expand([extents[axis] for axis in axes])


def _extents(body: sympy.Expr, axes: Sequence[sympy.Symbol], values: Values) -> dict[sympy.Symbol, int]:
    """Sizes of the ranks here: as given, else from the tensors that the expression reads."""
    found = {axis: values.extents[axis.name] for axis in axes if axis.name in values.extents}
    for item in body.atoms(AppliedUndef):
        for index, extent in zip(item.args, values.tensor(tensor_name(item)).shape, strict=True):
            if index.is_Symbol and is_rank(index):
                found.setdefault(index, extent)
    return found
