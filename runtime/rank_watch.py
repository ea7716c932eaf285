"""Which rank is to blame when a collective fails: every rank ends within a time limit, with a message that names it.

Beside the collectives the ranks share a small store, on connections of its own. A rank that fails sounds an alarm
there. A thread on each rank hears it and answers with what that rank is at; so a rank that is killed (no answer), one
that is slow (it computes, the others wait for it) and one that has failed by itself are told apart, and those that wait
for a rank which itself waits blame the right one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import EffccError
from ..formatting import first_line

_T = TypeVar("_T")
#: Most seconds that ranks have to answer an alarm, and how often they listen for one.
_PATIENCE, _LISTEN = 5.0, 0.25
#: What stands in the messages of gloo and NCCL, whose errors are plain RuntimeErrors.
_BACKENDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "pair closure")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class _State:
    """What a rank is at: ``step``, or what follows ``last``, the last exchange that ended. ``count``: steps begun.
    ``own``: the message of a failure that is not a collective's."""

    step: str = ""
    count: int = 0
    last: str = "the start"
    waits: bool = False
    own: str = ""

    @property
    def place(self) -> str:
        return self.step or f"what follows {self.last}"


class RankWatch:
    """Runs collectives and explains their failures. Made at once on all ranks of ``among`` (the default group, if
    None); ``group`` is a new one of the same ranks, whose collectives wait ``limit`` seconds.

    Args:
        error: what is raised; ``advice``: its remedy.
        alike: all ranks do the same steps one after the other, and collectives in them are others' (torch's), of which
            is not known who waits: the rank that has come least far is the slow one.

    Raises ``error`` when not all ranks come.
    """

    def __init__(
        self,
        limit: float,
        error: type[EffccError],
        advice: str,
        among: dist.ProcessGroup | None = None,
        *,
        alike: bool = False,
    ) -> None:
        self.limit, self.error, self.advice, self.alike = limit, error, advice, alike
        self.rank, self.ranks = dist.get_rank(among), dist.get_world_size(among)
        self.state = _State()
        self._listener: _Listener | None = None
        with self.waiting("the start, where all ranks meet"):
            self.group = _own_group(among, limit)
            if self.ranks > 1:
                self._listener = _Listener(self.rank, self.ranks, *self._stores(), min(limit, _PATIENCE), self.state)
                weakref.finalize(self, self._listener.closed.set)

    def _stores(self) -> tuple[Any, Any]:
        """Two connections to a store on the group's first rank, at a port that is free there: one to speak, one to
        listen."""
        patience = timedelta(seconds=self.limit)
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(self.group) == "nccl" else None
        where: list[Any] = [None]
        tcp_store = vars(dist)["TCPStore"]  # torch offers it without declaring it
        first = dist.get_global_rank(self.group, 0)
        stores = []
        if self.rank == 0:
            master = os.environ.get("MASTER_ADDR", "127.0.0.1")
            host = master if first == 0 or master in _LOOPBACK else socket.gethostname()
            stores = [tcp_store(host, 0, None, is_master=True, timeout=patience, wait_for_workers=False)]
            where = [(host, stores[0].port)]
        dist.broadcast_object_list(where, src=first, group=self.group, device=device)
        host, port = where[0]
        while len(stores) < 2:
            stores.append(tcp_store(host, port, None, is_master=False, timeout=patience, wait_for_workers=False))
        return stores[0], stores[1]

    def doing(self, step: str) -> None:
        """What this rank computes from now on."""
        self.state.step, self.state.waits = step, False
        self.state.count += 1

    @contextlib.contextmanager
    def waiting(self, step: str) -> Iterator[None]:
        """Around what waits for other ranks. A RuntimeError in it becomes an error that names rank and step."""
        before = self.state.step
        self.state.step, self.state.waits = step, True
        try:
            yield
        except RuntimeError as error:
            raise self._explain(step, error) from error
        self.state.last, self.state.step, self.state.waits = step, before, False

    def collective(self, step: str, call: Callable[[], _T]) -> _T:
        """``call()``, a collective or several, waited for."""
        with self.waiting(step):
            return call()

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Around steps with collectives in them that nothing here sees. A RuntimeError of one becomes an error that
        names rank and step; another is this rank's own, and the others are told."""
        try:
            yield
        except (RuntimeError, ValueError, IndexError) as error:
            place = self.state.place
            if not _of_a_collective(error):
                said = f"{type(error).__name__}: {first_line(error)}"
                self.failed(place, said)
                raise self.error(said, where=f"rank {self.rank}, {place}", remedy="the cause is above") from error
            assert isinstance(error, RuntimeError)
            raise self._explain(place, error) from error

    def failed(self, step: str, message: str) -> None:
        """Tell the others that this rank fails by itself at ``step``, so that they name it when they end."""
        self.state.step, self.state.waits, self.state.own = step, False, message
        if self._listener is not None:
            self._listener.alarm()
            self._listener.states()  # they have heard it

    def close(self) -> None:
        """Listen no more."""
        if self._listener is not None:
            self._listener.closed.set()

    def check_equal(self, what: str, own: bytes, remedy: str) -> None:
        """Raises ``error`` on all ranks where ``own`` is not the same on all: naming those that differ from most."""
        gathered: list[Any] = [None] * self.ranks
        self.collective(f"comparing {what}", lambda: dist.all_gather_object(gathered, own, group=self.group))
        usual = max(set(gathered), key=lambda value: (gathered.count(value), value == gathered[0]))
        other = [str(rank) for rank, value in enumerate(gathered) if value != usual]
        if other:
            raise self.error(
                f"rank {self.rank}: {what} of rank {', '.join(other)} differs from others'",
                where=f"comparing {what}", remedy=remedy,
            )  # fmt: skip

    def _explain(self, step: str, failure: RuntimeError) -> EffccError:
        reason = first_line(failure)
        blame = reason
        if self._listener is not None:
            self._listener.alarm()
            blame = self._blame(self._listener.states())
        return self.error(
            f"rank {self.rank}: {blame}", where=f"{step} (last done: {self.state.last}; {reason})", remedy=self.advice
        )

    def _blame(self, states: list[_State | None]) -> str:
        """Who is at fault, from what all ranks have answered."""
        if not states:
            return "rank 0 is gone"
        others = [(rank, state) for rank, state in enumerate(states) if rank != self.rank]
        if failed := [
            f"rank {rank} failed at {state.place}: {state.own}" for rank, state in others if state and state.own
        ]:
            return "; ".join(failed[:3])
        if gone := [str(rank) for rank, state in others if state is None]:
            return f"rank {', '.join(gone)} did not answer: it has ended, or was killed"
        computing = [(rank, state) for rank, state in enumerate(states) if state and not state.waits]
        if self.alike:
            least = min(state.count for state in states if state)
            behind = [(rank, state) for rank, state in enumerate(states) if state and state.count == least]
            computing = behind if len(behind) < self.ranks else []
        if slow := computing:
            named = "; ".join(f"rank {rank} was still at {state.place}" for rank, state in slow[:3])
            return f"{named}: slower than the time limit of {self.limit:g} s"
        return "all ranks answer, but their exchange failed"


def _of_a_collective(error: Exception) -> bool:
    """Whether torch.distributed raised it, or a backend of it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _BACKENDS)
    )


def _own_group(among: dist.ProcessGroup | None, limit: float) -> dist.ProcessGroup:
    """A new group of the same ranks, within ``limit`` seconds: gloo's barrier says on the first rank who is missing."""
    backend, patience = dist.get_backend(among), timedelta(seconds=limit)
    if backend == "gloo":
        dist.monitored_barrier(among, patience, wait_all_ranks=True)
    members = dist.get_process_group_ranks(among if among is not None else dist.group.WORLD)
    apart = len(members) < dist.get_world_size()
    found: dist.ProcessGroup | None = dist.new_group(
        members, timeout=patience, backend=backend, use_local_synchronization=apart
    )
    assert found is not None
    return found


class _Listener:
    """One rank's ear: a thread that answers an alarm with the rank's state, and learns the others'."""

    def __init__(self, rank: int, ranks: int, speaks: Any, listens: Any, patience: float, state: _State) -> None:
        self.rank, self.ranks, self.patience, self.state = rank, ranks, patience, state
        self._speaks, self._listens = speaks, listens
        self.closed = threading.Event()
        self._decided = threading.Event()
        self._released = threading.Event()
        self._states: list[_State | None] = []
        threading.Thread(target=self._listen, daemon=True, name="effcc rank watch").start()

    def alarm(self) -> None:
        """Wake all ranks' listeners."""
        with contextlib.suppress(RuntimeError):  # no store: rank 0 is gone, which the thread notices as well
            self._speaks.set("alarm", str(self.rank))

    def states(self) -> list[_State | None]:
        """What each rank was at when the alarm came, None for one that did not answer; empty if rank 0, which has the
        store, is gone. Rank 0 returns when the others have read it all."""
        self._decided.wait(2 * self.patience + 2.0)
        if self.rank == 0:
            self._released.wait(2 * self.patience)
        return self._states

    def _listen(self) -> None:
        try:
            while not self._listens.check(["alarm"]):
                if self.closed.wait(_LISTEN):
                    return
            self._confer()
        except RuntimeError:  # the store is gone
            pass
        finally:
            self._decided.set()
            self._released.set()

    def _confer(self) -> None:
        store = self._listens
        store.set(f"state/{self.rank}", json.dumps(asdict(self.state)))
        names = [f"state/{rank}" for rank in range(self.ranks)]
        self._until(lambda: all(store.check([name]) for name in names))
        self._states = [
            _State(**json.loads(store.get(name))) if store.check([name]) else None for name in names
        ]  # fmt: skip
        self._decided.set()
        store.set(f"read/{self.rank}", "")
        living = [f"read/{rank}" for rank, state in enumerate(self._states) if state is not None]
        if self.rank == 0:
            self._until(lambda: all(store.check([name]) for name in living))

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + self.patience
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)
