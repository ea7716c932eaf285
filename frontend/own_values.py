"""Fake tensors of copied ops: values of their own, that share storage where the originals do.

Views and writes are told from the storage of the values that Dynamo gives its ops. Two copies of one op with one value
would look as if the one were a view of the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes


class OwnValues:
    """The values of one copy of a graph."""

    def __init__(self) -> None:
        #: Storage of an original -> that of the copy.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._known: dict[int, torch.Tensor] = {}

    def stands_for(self, original: Any, value: Any) -> None:
        """What shares storage with ``original`` does so with ``value`` in the copy: for what comes in and goes out."""
        if _has_storage(original) and _has_storage(value):
            self._storages.setdefault(_key(original), value.untyped_storage())
            self._known.setdefault(id(original), value)

    def of(self, original: Any) -> Any:
        """The copy's value for the original's, which may hold several tensors."""
        return torch.utils._pytree.tree_map(self._tensor, original)

    def _tensor(self, original: Any) -> Any:
        if not _has_storage(original):
            return original
        if id(original) not in self._known:
            self._known[id(original)] = self._copied(original)
        return self._known[id(original)]

    def _copied(self, original: Any) -> torch.Tensor:
        """Made as FakeTensorMode makes what ops return, from meta tensors: its own ops take a millisecond each."""
        size, stride, offset = original.size(), original.stride(), original.storage_offset()
        with _disable_current_modes(), torch.no_grad():
            storage = self._storages.get(_key(original))
            if storage is None:
                whole = torch.empty(original.untyped_storage().nbytes(), dtype=torch.uint8, device="meta")
                storage = self._storages[_key(original)] = whole.untyped_storage()
            meta = torch.empty(0, dtype=original.dtype, device="meta").set_(storage, offset, size, stride)
            value = FakeTensor(original.fake_mode, meta, original.device)
        return value.requires_grad_(original.requires_grad)


def _has_storage(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.layout is torch.strided


def _key(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)
