"""Tensors whose memory is elsewhere: any operation on one brings it back first.

A parameter that is away keeps its identity, its shape and its place in modules and optimizers; only its storage is
empty and its class another. The class intercepts every operation of torch, asks the tensor's home to bring the values
back, and lets the operation go on. So nobody who uses a model needs to know what is where.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ... import torch_internals

if TYPE_CHECKING:
    from .residency import Home

#: Home of each tensor that has one, by the tensor's ``id``; a home removes itself when its tensor is gone.
homes: dict[int, Home] = {}

#: Questions about a tensor that its values have no part in. Anything else brings the values in.
_PROPERTIES = (
    "shape device dtype layout requires_grad grad grad_fn is_leaf ndim _version is_cuda is_cpu is_meta is_sparse names "
    "itemsize nbytes is_quantized is_mkldnn is_nested output_nr retains_grad _backward_hooks name is_xpu is_mps"
).split()
_METHODS = (
    "size stride dim numel nelement element_size is_floating_point is_complex is_contiguous storage_offset __hash__ "
    "__len__ register_hook register_post_accumulate_grad_hook requires_grad_ is_signed get_device ndimension "
    "is_shared is_pinned is_same_size is_conj is_neg is_inference"
).split()


def _questions() -> set[Any]:
    found: set[Any] = {torch.is_tensor, torch.is_floating_point, torch.is_complex, torch.numel}
    for name in _PROPERTIES:
        accessor = getattr(torch.Tensor, name, None)
        found |= {getattr(accessor, "__get__", None), getattr(accessor, "__set__", None)}
    found |= {getattr(torch.Tensor, name, None) for name in _METHODS}
    return found - {None}


_QUESTIONS = _questions()


class _Away:
    """What both classes below do."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _QUESTIONS:
            with torch_internals.plain_tensors():
                return function(*args, **(kwargs or {}))
        touched = []
        try:
            for value in [*_away_among((args, kwargs))]:
                home = homes[id(value)]
                home.users += 1
                touched.append(home)
                home.residency.touch(home)
            return function(*args, **(kwargs or {}))
        finally:
            for home in touched:
                home.users -= 1
            for residency in {home.residency for home in touched}:
                residency.trim()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(_brought_in(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensor: Any = _brought_in(self)
        return tensor.__reduce_ex__(protocol)


class AwayParameter(_Away, torch.nn.Parameter):
    """A parameter whose values are elsewhere."""


class AwayTensor(_Away, torch.Tensor):
    """A tensor, such as an optimizer's state, whose values are elsewhere."""


#: Classes that can be sent away, with what they are meanwhile.
AWAY: dict[type, type] = {torch.nn.Parameter: AwayParameter, torch.Tensor: AwayTensor}


def _brought_in(value: Any) -> torch.Tensor:
    """``value`` itself, with its values: its class is that of the user's tensor again."""
    home = homes[id(value)]
    home.residency.touch(home)
    tensor: torch.Tensor = value
    return tensor


def _away_among(tree: Any) -> Iterator[Any]:
    """The tensors that are away in nested lists, tuples and dictionaries."""
    if isinstance(tree, _Away):
        yield tree
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _away_among(value)
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _away_among(value)
