"""Schedules as the CSV of actions of ``torch.distributed.pipelining``: a line a rank, an action a cell, such as
``2F0``.

The vocabulary's passes have no action of their own there. They travel in the slots of UNSHARD and RESHARD, which
torch's runtime hands to functions registered with ``register_custom_function``: S is ``UNSHARD``, T is ``RESHARD`` (of
the rank's first stage), with the microbatch; E and D are left to the first stage's forward and backward hooks.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

from ...errors import ScheduleError
from .schedule import Pass, Schedule

_ACTION = re.compile(r"(\d+)(F|B|I|W|UNSHARD|RESHARD)(\d+)")
_SLOT = {"S": "UNSHARD", "T": "RESHARD"}
_PASS = {slot: kind for kind, slot in _SLOT.items()}


def without_embedding(schedule: Schedule) -> Schedule:
    """The schedule without passes of the embedding, for which torch's actions have no place."""
    orders = tuple(tuple(each for each in order if each.kind not in "ED") for order in schedule.orders)
    return replace(schedule, orders=orders, embedding=False)


def to_csv(schedule: Schedule) -> str:
    """The schedule as text. Raises ScheduleError for one with embedding passes."""
    if schedule.embedding:
        raise ScheduleError(
            f"{schedule.name} has embedding passes, for which torch's actions have no place",
            remedy="give without_embedding(schedule), or make it with embedding=False",
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for order in schedule.orders:
        writer.writerow(f"{each.stage}{_SLOT.get(each.kind, each.kind)}{each.microbatch}" for each in order)
    return text.getvalue()


def from_csv(text: str, name: str = "csv", vocabulary: str = "") -> Schedule:
    """A schedule from torch's CSV; empty cells (a rank that waits) and communication are dropped, since both follow
    from the order. Raises ScheduleError for other cells, and for a schedule that cannot run."""
    orders: list[tuple[Pass, ...]] = []
    placement: dict[int, int] = {}
    for rank, line in enumerate(csv.reader(io.StringIO(text))):
        order = []
        for cell in line:
            word = cell.strip()
            if not word or re.fullmatch(r"\d+(SEND|RECV)_[FB]\d+", word):
                continue
            match = _ACTION.fullmatch(word)
            if match is None:
                raise ScheduleError(
                    f"{word!r} is no action that is known here", where=f"line {rank + 1}", remedy="such as 2F0 or 1W3"
                )
            stage, kind, microbatch = int(match[1]), match[2], int(match[3])
            order.append(Pass(_PASS.get(kind, kind), stage, microbatch))
            if kind not in _PASS and placement.setdefault(stage, rank) != rank:
                raise ScheduleError(
                    f"stage {stage} is on rank {placement[stage]} and on rank {rank}", where=f"line {rank + 1}",
                    remedy="a stage has one rank",
                )  # fmt: skip
        orders.append(tuple(order))
    if sorted(placement) != list(range(len(placement))) or not placement:
        raise ScheduleError(f"the stages are {sorted(placement)}", remedy="number them from 0 without gaps")
    microbatches = 1 + max(each.microbatch for order in orders for each in order)
    schedule = Schedule(
        name, microbatches, tuple(placement[stage] for stage in sorted(placement)), tuple(orders), vocabulary
    )
    schedule.check()
    return schedule
