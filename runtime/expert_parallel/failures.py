"""Which rank is to blame when a collective fails: every rank ends within a time limit, with a message that names it.

Beside the collectives the ranks share a small store, on a connection of its own. A rank whose collective fails says so
there and waits a moment for the others; whoever says nothing is gone, or slower than the time limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...errors import ExpertParallelError

_T = TypeVar("_T")
#: Most seconds that a failed rank waits for what the others have to say.
_PATIENCE = 10.0


class RankWatch:
    """Runs collectives of a group and explains their failures. Made on all ranks at once; ``limit``: seconds."""

    def __init__(self, group: dist.ProcessGroup, limit: float) -> None:
        self.group, self.limit = group, limit
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.last = "the start"
        self.store = self._connect() if self.ranks > 1 else None

    def _connect(self) -> Any:
        """The store is on the group's first rank, at a port that is free there."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        patience = timedelta(seconds=self.limit)
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(self.group) == "nccl" else None
        where: list[object] = [None]
        store = None
        tcp_store = vars(dist)["TCPStore"]  # torch offers it without declaring it
        if self.rank == 0:
            store = tcp_store(host, 0, self.ranks, is_master=True, timeout=patience, wait_for_workers=False)
            where = [store.port]
        dist.broadcast_object_list(where, src=dist.get_global_rank(self.group, 0), group=self.group, device=device)
        if store is None:
            store = tcp_store(host, int(str(where[0])), self.ranks, timeout=patience, wait_for_workers=False)
        return store

    def collective(self, step: str, call: Callable[[], _T]) -> _T:
        """``call()``, a collective or several. Raises ExpertParallelError that names rank and step if it fails."""
        try:
            result = call()
        except RuntimeError as error:
            raise self._explain(step, error) from error
        self.last = step
        return result

    def _explain(self, step: str, error: RuntimeError) -> ExpertParallelError:
        silent = self._silent(step)
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if silent is None:
            blame = "rank 0 is gone"
        elif silent:
            named = ", ".join(map(str, silent))
            blame = f"rank {named} did not answer within {self.limit:g} s: killed, or slower than that"
        else:
            blame = "all ranks answer, but their exchange failed"
        return ExpertParallelError(
            f"rank {self.rank}: {blame}", where=f"{step} (last done: {self.last}; {reason})",
            remedy="see that rank's own output; a larger time limit is an argument of parallelize_experts",
        )  # fmt: skip

    def _silent(self, step: str) -> list[int] | None:
        """The ranks that say nothing; None if the store, which is on rank 0, is gone."""
        if self.store is None:
            return []
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        until = time.monotonic() + min(self.limit, _PATIENCE)
        try:
            self.store.set(f"failed/{self.rank}", step)
            while True:
                silent = [rank for rank in others if not self.store.check([f"failed/{rank}"])]
                if not silent or time.monotonic() >= until:
                    break
                time.sleep(0.05)
            if self.rank == 0:
                time.sleep(1.0)  # the others read the store, which ends with this process
        except (RuntimeError, OSError):
            return None
        return silent
