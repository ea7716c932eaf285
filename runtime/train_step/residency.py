"""What is in memory and what is away. Values come in when they are used and leave as soon as nobody needs them.

Two allowances, in bytes, make a step faster than the least memory would: ``kept`` homes stay, and copies may run ahead
of their use and behind it within a ``window``. What is in memory at any moment exceeds what would be there without
them by no more than kept bytes and window.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ... import torch_internals
from ...errors import SwapError
from .away import AWAY, homes
from .stores import Copy, Store

#: How many homes ahead of the one that comes in are looked at.
_LOOK_AHEAD = 32


class Home:
    """Where one tensor's memory goes when it is away. ``bytes``: of its storage."""

    def __init__(self, residency: Residency, tensor: torch.Tensor, name: str, place: Any) -> None:
        self.residency = residency
        self.name = name
        self.key = id(tensor)
        self.tensor = weakref.ref(tensor, self._forget)
        self.storage = tensor.untyped_storage()
        self.storage_key = torch_internals.storage_key(tensor)
        self.bytes = self.storage.nbytes()
        self.place = place
        self.plain: type = type(tensor)
        self.here = True
        #: Whether memory and place may differ, and the tensor's version when they last agreed.
        self.dirty = True
        self.version = tensor._version
        self.kept = False
        #: How many operations that run now need the values.
        self.users = 0
        #: A graph from outside the step holds the tensor: its memory stays while the step runs.
        self.pinned = False
        #: The copy that is under way, in whichever direction.
        self.copy: Copy | None = None
        #: How many values of it are saved for the backward.
        self.saved = 0
        #: Whether it is an optimizer's state, not a parameter.
        self.is_state = self.plain is torch.Tensor

    def _forget(self, _: object) -> None:
        self.residency.forget(self)


class Residency:
    """The tensors of one training step that have a home."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lock = threading.RLock()
        self.by_storage: dict[int, Home] = {}
        #: Homes that are here and may leave, that are being written, and that are being read ahead, oldest first.
        self.here: dict[int, Home] = {}
        self.writing: dict[int, Home] = {}
        self.reading: dict[int, Home] = {}
        #: Bytes that copies in flight may hold; whether nothing has to leave.
        self.window = 0
        self.all_stay = False
        #: Whether autograd saves nothing of ours by itself: true within a step, where ``saved`` sees to it.
        self.in_step = False
        #: Homes in the order in which they came in, in this step and in the last; where the last has got to.
        self.order: list[Home] = []
        self.last_order: list[Home] = []
        self.ahead = 0
        #: Called with each home that comes in.
        self.watch: Callable[[Home], None] | None = None
        #: Owners of a storage, and of the Python object that stands for it, when they are a tensor and its home alone.
        probe = torch.empty(8)
        held = [probe.untyped_storage()]
        self.alone = torch_internals.storage_owners(held[0]), sys.getrefcount(held[0])

    def adopt(self, tensor: torch.Tensor, name: str) -> Home:
        """Give ``tensor`` a home; it is the one owner of a storage that can be resized. Raises SwapError."""
        home = Home(self, tensor, name, self.store.reserve(tensor.untyped_storage().nbytes()))
        homes[home.key] = self.by_storage[home.storage_key] = home
        home.kept = self.all_stay
        if not home.kept:
            self.here[home.key] = home
        return home

    def forget(self, home: Home) -> None:
        """Drop a home with what is in it; its tensor is left as it is."""
        with self.lock:
            if home.copy is not None:
                home.copy.wait()
            for group in (self.here, self.writing, self.reading):
                group.pop(home.key, None)
            if self.by_storage.get(home.storage_key) is home:
                del self.by_storage[home.storage_key]
            if homes.get(home.key) is home:
                del homes[home.key]
            self.store.release(home.place)

    def home_of(self, value: torch.Tensor) -> Home | None:
        """The home whose memory ``value`` is a view of."""
        return self.by_storage.get(torch_internals.storage_key(value))

    def homes(self) -> list[Home]:
        return list(self.by_storage.values())

    def touch(self, home: Home) -> None:
        """Bring a home's values in for a use that cannot be seen. Raises SwapError."""
        self.bring_in(home)
        if not self.in_step:
            home.dirty = True  # through ``p.data``, for one, values change and the version does not

    def bring_in(self, home: Home) -> torch.Tensor:
        """The home's tensor with its values. Raises SwapError where they are lost."""
        with self.lock:
            tensor = home.tensor()
            assert tensor is not None
            if home.here:
                return tensor
            if home.key in self.writing:
                self._wait(home, self.writing)
            else:
                self.trim()
                if home.key not in self.reading:
                    self._read(home)
                self._wait(home, self.reading)
            tensor.__class__ = home.plain
            home.here, home.version = True, tensor._version
            if not home.kept:
                self.here[home.key] = home
            self.order.append(home)
            if self.watch is not None:
                self.watch(home)
            self._read_ahead(home)
            return tensor

    def drop(self, home: Home) -> None:
        """Send values away without what was done to them since they came. Nobody else may use them."""
        tensor = home.tensor()
        if tensor is not None and home.here:
            home.dirty, home.version = False, tensor._version
            self._send_away(home, tensor)

    def idle(self, home: Home) -> bool:
        """Whether nobody uses the values of a home that is here."""
        tensor = home.tensor()
        return (
            tensor is not None
            and home.here
            and not home.users
            and not home.pinned
            and torch_internals.storage_owners(home.storage) <= self.alone[0]
            and sys.getrefcount(home.storage) <= self.alone[1]
            and (self.in_step or torch_internals.tensor_owners(tensor) == 1)
        )

    def trim(self) -> None:
        """Send away what is idle; then wait for copies until they hold no more than the window."""
        with self.lock:
            for home in [*self.here.values()]:
                tensor = home.tensor()
                if tensor is not None and self.idle(home):
                    self._send_away(home, tensor)
            for home in [*self.writing.values()]:
                assert home.copy is not None
                if home.copy.finished() or self._in_flight() > self.window:
                    self._wait(home, self.writing)
                    home.storage.resize_(0)

    def keep(self, chosen: Iterable[Home] | None) -> None:
        """From now on these stay once they are here, and no others; None: all do, and those that come later."""
        with self.lock:
            self.all_stay = chosen is None
            wanted = {home.key for home in chosen or ()}
            for home in self.by_storage.values():
                home.kept = self.all_stay or home.key in wanted
                if home.kept:
                    self.here.pop(home.key, None)
                elif home.here:
                    self.here[home.key] = home

    def look_again(self) -> None:
        """Forget tensors that the user has given other memory (``p.data = ...``)."""
        with self.lock:
            for home in [*self.by_storage.values()]:
                tensor = home.tensor()
                if tensor is not None and torch_internals.storage_key(tensor) != home.storage_key:
                    self.forget(home)

    def begin_step(self) -> None:
        with self.lock:
            for home in self.by_storage.values():
                tensor = home.tensor()
                home.pinned = home.here and tensor is not None and torch_internals.tensor_owners(tensor) > 1
            self.in_step = True
            self.trim()
            self.last_order, self.order, self.ahead = self.order, [], 0

    def end_step(self) -> None:
        with self.lock:
            try:
                for home in [*self.reading.values()]:
                    self._wait(home, self.reading)
                    home.storage.resize_(0)
                self.trim()
            finally:
                self.in_step = False

    def recover(self) -> None:
        """After a failure: values whose copy has failed, too, stay here, until there is another occasion."""
        with self.lock:
            for group in (self.writing, self.reading):
                for home in [*group.values()]:
                    with contextlib.suppress(SwapError):
                        self._wait(home, group)
                        home.storage.resize_(0)

    def _send_away(self, home: Home, tensor: torch.Tensor) -> None:
        if home.dirty or tensor._version != home.version:
            home.copy = self.store.write(home.place, home.storage)
            self.writing[home.key] = home
        else:
            home.storage.resize_(0)
        home.here = False
        self.here.pop(home.key, None)
        tensor.__class__ = AWAY[home.plain]

    def _read(self, home: Home) -> None:
        home.storage.resize_(home.bytes)
        home.copy = self.store.read(home.place, home.storage)
        self.reading[home.key] = home

    def _wait(self, home: Home, group: dict[int, Home]) -> None:
        """Wait for the copy of a home in ``group``. Where it failed, values that are only here stay here."""
        copy, home.copy = home.copy, None
        del group[home.key]
        assert copy is not None
        try:
            copy.wait()
        except BaseException:
            tensor = home.tensor()
            if group is self.reading:
                home.storage.resize_(0)
            elif tensor is not None:
                tensor.__class__ = home.plain
                home.here = home.dirty = True
                self.here[home.key] = home
            raise
        home.dirty = False

    def _in_flight(self) -> int:
        return sum(home.bytes for group in (self.writing, self.reading) for home in group.values())

    def _read_ahead(self, home: Home) -> None:
        """Start to read what came in after ``home`` in the last step, as far as the window goes."""
        coming = self.last_order[self.ahead : self.ahead + _LOOK_AHEAD]
        if home in coming:
            self.ahead += coming.index(home) + 1
            coming = self.last_order[self.ahead : self.ahead + _LOOK_AHEAD]
        for other in coming:
            if other.here or other.copy is not None or other.tensor() is None:
                continue
            if self._in_flight() + other.bytes > self.window:
                return
            self._read(other)

    def names_here(self) -> dict[str, int]:
        """Bytes in memory of each home that is here."""
        return {home.name: home.bytes for home in self.by_storage.values() if home.storage.nbytes()}
