"""Einsums of a cascade on torch tensors: what one device computes of the output layer.

A sum of products is contracted with ``torch.einsum``, so that ``sum[v] exp(Z[t,v] - MX[t]) * W[v,d]`` is one matrix
product; a product with ``where(v == T[t], 1, 0)`` is a lookup of the row T[t].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from sympy.core.function import AppliedUndef

from ...errors import CascadeError
from ...ir.cascade import Equal, Maximum, Minimum, Where, is_size, tensor_name


@dataclass(frozen=True)
class Values:
    """``tensors`` by name. ``first``: the first coordinate of a rank that is split over devices (0 for others);
    ``sizes``: sizes of whole ranks."""

    tensors: Mapping[str, torch.Tensor]
    first: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def with_tensors(self, more: Mapping[str, torch.Tensor]) -> Values:
        return Values({**self.tensors, **more}, self.first, self.sizes)

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise CascadeError(f"{name} has no value", where=name, remedy="give the tensor")
        return self.tensors[name]


def reduce(
    body: sympy.Expr,
    reduction: str | None,
    kept: Sequence[sympy.Symbol],
    reduced: Sequence[sympy.Symbol],
    values: Values,
) -> torch.Tensor:
    """``reduction[reduced] body`` with axes ``kept``, on the coordinates that the tensors here have."""
    extents = _extents(body, values)
    if reduction is None or not reduced:
        return _full(evaluate(body, kept, values, extents), kept, extents)
    if reduction != "sum":
        axes = (*kept, *reduced)
        whole = _full(evaluate(body, axes, values, extents), axes, extents)
        dimensions = tuple(range(len(kept), len(axes)))
        return whole.amax(dimensions) if reduction == "max" else whole.amin(dimensions)
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
    if isinstance(e, AppliedUndef):
        return _aligned(values.tensor(tensor_name(e)), e.args, axes)
    if e.is_Symbol:
        return _symbol(e, axes, values, extents)
    if not e.args:
        return torch.tensor(float(e), dtype=_dtype(values))
    parts = [evaluate(argument, axes, values, extents) for argument in e.args]
    if e.is_Add or e.is_Mul:
        result = parts[0]
        for part in parts[1:]:
            result = result + part if e.is_Add else result * part
        return result
    if e.is_Pow:
        return 1 / parts[0] if e.args[1] == -1 else torch.pow(parts[0], parts[1])
    if isinstance(e, Where):
        return torch.where(parts[0] != 0, parts[1], parts[2])
    if isinstance(e, Equal):
        return parts[0] == parts[1]
    if isinstance(e, Maximum | Minimum):
        return torch.maximum(*parts) if isinstance(e, Maximum) else torch.minimum(*parts)
    if e.func is sympy.exp:
        return torch.exp(parts[0])
    if e.func is sympy.log:
        return torch.log(parts[0])
    raise CascadeError(f"{e.func} has no value here", where=str(e), remedy="extend runtime/pipeline/einsum.py")


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
    if indicator is not None and len(factors) > 1:
        factors.remove(indicator)
        return _lookup(indicator, sympy.Mul(*factors), kept, values, extents)
    groups: dict[tuple[sympy.Symbol, ...], list[sympy.Expr]] = {}
    for factor in factors:
        own = tuple(axis for axis in axes if axis in _axes_of(factor))
        groups.setdefault(own, []).append(factor)
    # A factor whose axes lie in another group's is multiplied there, the smallest that has them.
    for own in sorted(groups, key=len):
        hosts = [other for other in groups if other != own and set(own) <= set(other)]
        if hosts:
            groups[min(hosts, key=len)] += groups.pop(own)
    letters = {axis: chr(ord("a") + number) for number, axis in enumerate(axes)}
    operands, inputs = [], []
    for own, items in groups.items():
        operands.append(_full(evaluate(sympy.Mul(*items, evaluate=False), own, values, extents), own, extents))
        inputs.append("".join(letters[axis] for axis in own))
    covered = {axis for own in groups for axis in own}
    if missing := [axis for axis in axes if axis not in covered]:
        ones = torch.ones([extents[axis] for axis in missing], dtype=operands[0].dtype)
        operands.append(ones)
        inputs.append("".join(letters[axis] for axis in missing))
    return torch.einsum(f"{','.join(inputs)}->{''.join(letters[axis] for axis in kept)}", *operands)


def _indicator(e: sympy.Expr, reduced: Sequence[sympy.Symbol]) -> bool:
    """Whether it is 1 at one coordinate of a reduced rank, which a tensor names, and 0 elsewhere."""
    if not isinstance(e, Where) or not isinstance(e.args[0], Equal) or e.args[1:] != (1, 0):
        return False
    left, right = e.args[0].args
    return len(reduced) == 1 and left == reduced[0] and isinstance(right, AppliedUndef)


def _lookup(
    indicator: sympy.Expr,
    rest: sympy.Expr,
    kept: Sequence[sympy.Symbol],
    values: Values,
    extents: Mapping[sympy.Symbol, int],
) -> torch.Tensor:
    """``sum[v] where(v == T[t], 1, 0) * rest`` is rest at v = T[t], or 0 where that lies on another device."""
    rank, named = indicator.args[0].args
    place = values.tensor(tensor_name(named)) - values.first.get(rank.name, 0)
    inside = (place >= 0) & (place < extents[rank])
    place = torch.where(inside, place, 0)
    own = tuple(axis for axis in kept if axis in _axes_of(rest))
    shared = [axis for axis in own if axis in named.args]
    if shared:
        raise CascadeError(f"{rest} depends on {shared[0]} beside {indicator}", where=str(rest))
    table = _full(evaluate(rest, (rank, *own), values, extents), (rank, *own), extents)
    rows = table[place] * inside.reshape(*inside.shape, *(1,) * len(own)).to(table.dtype)
    found = (*named.args, *own)
    return rows.permute(*(found.index(axis) for axis in kept))


def _axes_of(e: sympy.Expr) -> set[sympy.Symbol]:
    return {symbol for symbol in e.free_symbols if not is_size(symbol)}


def _symbol(
    e: sympy.Symbol, axes: Sequence[sympy.Symbol], values: Values, extents: Mapping[sympy.Symbol, int]
) -> torch.Tensor:
    name = e.name.strip("|")
    if is_size(e):
        return torch.tensor(float(values.sizes[name]), dtype=_dtype(values))
    shape = [extents[e] if axis == e else 1 for axis in axes]
    return (values.first.get(name, 0) + torch.arange(extents[e])).reshape(shape)


def _aligned(tensor: torch.Tensor, indices: Sequence[sympy.Symbol], axes: Sequence[sympy.Symbol]) -> torch.Tensor:
    """A tensor with axes ``indices`` as one with ``axes``, of size 1 where it has none."""
    order = [list(indices).index(axis) for axis in axes if axis in indices]
    shape = [tensor.shape[list(indices).index(axis)] if axis in indices else 1 for axis in axes]
    return tensor.permute(order).reshape(shape)


def _full(tensor: torch.Tensor, axes: Sequence[sympy.Symbol], extents: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    return tensor.expand([extents[axis] for axis in axes])


def _extents(body: sympy.Expr, values: Values) -> dict[sympy.Symbol, int]:
    """Sizes of the ranks here, from the tensors that the expression reads."""
    found: dict[sympy.Symbol, int] = {}
    for item in body.atoms(AppliedUndef):
        for axis, extent in zip(item.args, values.tensor(tensor_name(item)).shape, strict=True):
            found[axis] = extent
    return found


def _dtype(values: Values) -> torch.dtype:
    return next((each.dtype for each in values.tensors.values() if each.is_floating_point()), torch.float64)
