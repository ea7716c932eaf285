"""Joining torch.distributed's default group within a time limit, with a message that says what was missing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import EffccError, PipelineError
from ..formatting import first_line


def join_group(backend: str = "gloo", limit: float = 120.0, error: type[EffccError] = PipelineError) -> None:
    """``init_process_group`` from the variables that torch's launcher sets (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), in ``limit`` seconds; collectives of the default group have the same limit.

    Raises ``error``, naming the rank: a variable is missing, the port is taken, another program listens there, or not
    all processes came.
    """
    rank, place = os.environ.get("RANK", "?"), f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise error(f"{', '.join(missing)} not set", where="joining the group", remedy="start with torchrun")
    where = f"rank {rank}, joining the group at {place}"
    patience = timedelta(seconds=limit)
    world = int(os.environ["WORLD_SIZE"])
    try:
        # A store waits without end for an answer from a program that listens at its port and is no store.
        rendezvous = vars(dist)["rendezvous"]  # torch offers it without declaring it
        store = _within(2 * limit + 1.0, lambda: next(rendezvous("env://", timeout=patience))[0])
        dist.init_process_group(backend, store=store, rank=int(rank), world_size=world, timeout=patience)
    except (RuntimeError, ValueError) as failure:
        raise error(_said(rank, place, limit, failure), where=where, remedy=_remedy(str(failure))) from failure


def _said(rank: str, place: str, limit: float, failure: Exception) -> str:
    text = str(failure)
    if "EADDRINUSE" in text:
        return f"rank {rank} cannot listen at {place}: the port is taken"
    if "no answer" in text or "connect" in text:
        return f"rank {rank} finds no group at {place} within {limit:g} s"
    return f"rank {rank} could not join its group within {limit:g} s: {first_line(failure)}"


def _remedy(text: str) -> str:
    if "EADDRINUSE" in text:
        return "set MASTER_PORT to a port that is free, or start with torchrun --standalone, which finds one"
    return "start as many processes as WORLD_SIZE says, with one address and port; see rank 0's own message"


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """``call()`` in a thread that is given up after so many seconds. Raises RuntimeError then, or what it raised."""
    found: list[Any] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(call())
        except (RuntimeError, ValueError) as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name="effcc join")
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise RuntimeError("no answer")
    return found[0]
