"""What the forward saves for the backward: parameters by name, other values in memory or away.

Autograd asks here (``torch.autograd.graph.saved_tensors_hooks``) what to keep in a saved value's place. Of a parameter
it keeps which part of it is meant, so that the values can leave meanwhile. Other values stay while the room for them
lasts, and are written to the tier below beyond that.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ... import torch_internals
from ...errors import TrainStepError
from ..host_tier import extent, laid_out
from .away import AWAY
from .residency import Home, Residency
from .stores import Store

#: Bytes below which a value is not worth a copy.
SMALLEST = 2048


class _Reference:
    """A view of a parameter."""

    def __init__(self, home: Home, value: torch.Tensor) -> None:
        self.home, self.dtype = home, value.dtype
        self.layout = value.storage_offset(), value.size(), value.stride()
        tensor = home.tensor()
        assert tensor is not None
        self.version = tensor._version
        home.saved += 1

    def __del__(self) -> None:
        self.home.saved -= 1

    def value(self) -> torch.Tensor:
        tensor = self.home.residency.bring_in(self.home)
        if tensor._version != self.version:
            raise TrainStepError(
                f"{self.home.name} was changed between the forward that read it and the backward that needs it",
                where=self.home.name,
                remedy="Change parameters between steps, not in the model's forward or in the loss.",
            )
        with torch_internals.plain_tensors():
            return torch.empty(0, dtype=self.dtype, device=tensor.device).set_(self.home.storage, *self.layout)


class _Memory:
    """A storage with saved values in it. While this lives, no other storage has its key."""

    def __init__(self, value: torch.Tensor) -> None:
        self.bytes = value.untyped_storage().nbytes()
        self.source = torch_internals.weak_storage(value)
        self.held: weakref.ref[_Held] | None = None


class _Held:
    """Counts a memory that stays, for as long as values in it are kept."""

    def __init__(self, keeper: SavedValues, memory: _Memory) -> None:
        self.keeper, self.memory, self.where = keeper, memory, keeper.in_replay
        keeper.held[self.where] += memory.bytes

    def __del__(self) -> None:
        self.keeper.held[self.where] -= self.memory.bytes


@dataclass
class _Kept:
    """A value that stays in memory."""

    tensor: torch.Tensor
    held: _Held | None = None
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.version = self.tensor._version
        # With its graph, an output would keep the node that keeps it.
        self.tensor = self.tensor.detach()

    def value(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise TrainStepError(
                "a value that the backward needs was changed in place after the forward saved it",
                where=f"{self.tensor.dtype} of shape {list(self.tensor.shape)}",
                remedy="Write the change out of place; eager mode refuses it, too.",
            )
        return self.tensor


class _Written:
    """Bytes in the tier below."""

    def __init__(self, store: Store, memory: _Memory, value: torch.Tensor, start: int, size: int) -> None:
        self.store, self.memory = store, memory
        self.bytes, self.place = size, store.reserve(size)
        store.write(self.place, value.untyped_storage(), start).wait()

    def __del__(self) -> None:
        if hasattr(self, "place"):
            self.store.release(self.place)

    def load(self, device: torch.device) -> torch.Tensor:
        found = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        self.store.read(self.place, found.untyped_storage()).wait()
        return found


@dataclass
class _Away:
    """A value that is written."""

    written: _Written
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def value(self) -> torch.Tensor:
        return laid_out(self.written.load(self.device), self.size, self.stride, self.dtype)


@dataclass
class SavedValues:
    """The hooks of one training step. Rooms are bytes of values, other than parameters, that may stay in memory:
    ``room`` outside of replays, ``replay_room`` within one; None: all of them."""

    residency: Residency | None
    room: int | None = None
    replay_room: int | None = None
    in_replay: bool = False
    #: Whether nothing that is saved now will be asked for.
    dropped: bool = False
    #: Bytes that stay now, outside and within a replay, and bytes saved so far: each memory is counted once.
    held: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    saved: int = 0
    memories: weakref.WeakValueDictionary[int, _Memory] = field(default_factory=weakref.WeakValueDictionary)
    #: What is written, by memory, offset, length and version.
    written: weakref.WeakValueDictionary[tuple[int, int, int, int], _Written] = field(
        default_factory=weakref.WeakValueDictionary
    )

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack)

    @contextlib.contextmanager
    def dropping(self) -> Iterator[None]:
        """While it lasts, nothing that is saved is kept: no backward will ask for it."""
        self.dropped = True
        try:
            yield
        finally:
            self.dropped = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pack(self, value: torch.Tensor) -> Any:
        if self.dropped:
            return None
        home = self.residency.home_of(value) if self.residency is not None else None
        if home is not None and not value.is_conj() and not value.is_neg():
            return _Reference(home, value)
        if not _can_leave(value) or (self.residency and value.device.type != self.residency.store.device.type):
            return _Kept(value)
        memory = self._memory(value)
        held = memory.held() if memory.held is not None else None
        if held is None and self._may_stay(memory.bytes):
            held = _Held(self, memory)
            memory.held = weakref.ref(held)
        if held is not None:
            return _Kept(value, held)
        assert self.residency is not None
        size, start = extent(value), int(value.storage_offset()) * value.element_size()
        key = (torch_internals.storage_key(value), start, size, value._version)
        known = self.written.get(key)
        if known is None:
            known = self.written[key] = _Written(self.residency.store, memory, value, start, size)
        return _Away(known, value.size(), value.stride(), value.dtype, value.device)

    def _memory(self, value: torch.Tensor) -> _Memory:
        key = torch_internals.storage_key(value)
        known = self.memories.get(key)
        if known is None:
            known = self.memories[key] = _Memory(value)
            self.saved += known.bytes
        return known

    def _may_stay(self, size: int) -> bool:
        room = self.replay_room if self.in_replay else self.room
        return self.residency is None or room is None or self.held[self.in_replay] + size <= room


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _unpack(packed: Any) -> torch.Tensor:
    value: torch.Tensor = packed.value()
    return value


def _can_leave(value: torch.Tensor) -> bool:
    plain = type(value) in AWAY and value.layout == torch.strided and not (value.is_conj() or value.is_neg())
    return plain and value.nbytes >= SMALLEST and not value.is_meta and not value.is_quantized
