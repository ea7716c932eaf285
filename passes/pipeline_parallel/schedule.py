"""Pipeline schedules as data: which pass of which microbatch each rank runs, in which order.

A model is cut into *virtual stages* 0, 1, ..., each on one rank (``placement``); a batch into microbatches. Passes:

    F  forward of a stage            B  its whole backward
    I  backward of its input alone   W  backward of its weights alone (I and W together are B)
    S  this rank's share of the output layer and the loss, up to the first barrier
    T  the rest of the output layer
    E  this rank's share of the input embedding
    D  its gradient

S, T, E and D exist where the vocabulary is sharded over all ranks; ``vocabulary`` says by which algorithm (Yeung et
al., Balancing Pipeline Parallelism with Vocabulary Parallelism, 2024): ``two-barriers`` (the paper's algorithm 1: B of
the last stage waits for T), ``one-barrier`` (algorithm 2: T is the weight gradient, which nothing waits for), or
``interlaced`` (all ranks run S and T together, waiting for each other).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ...errors import ScheduleError

STAGE_KINDS = ("F", "B", "I", "W")
VOCABULARY_KINDS = ("S", "T", "E", "D")
VOCABULARY = ("", "two-barriers", "one-barrier", "interlaced")


class Pass(NamedTuple):
    """One pass. ``stage`` is the virtual stage; of S, T, E and D it is the rank whose shard is meant."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """``orders[r]`` is what rank r runs, first to last; ``placement[s]`` the rank of virtual stage s."""

    name: str
    microbatches: int
    placement: tuple[int, ...]
    orders: tuple[tuple[Pass, ...], ...]
    vocabulary: str = ""
    #: Whether the input embedding is sharded as well (passes E and D).
    embedding: bool = False

    @property
    def ranks(self) -> int:
        return len(self.orders)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def last(self) -> int:
        return len(self.placement) - 1

    @cached_property
    def split_backward(self) -> bool:
        """Whether backward is I and W instead of B."""
        return any(each.kind == "I" for order in self.orders for each in order)

    @property
    def backward(self) -> str:
        """The kind that hands a gradient to the stage before: B, or I."""
        return "I" if self.split_backward else "B"

    @property
    def end_kind(self) -> str:
        """The pass that ends a stage's backward and frees its activations: B, or W."""
        return "W" if self.split_backward else "B"

    def rank_of(self, each: Pass) -> int:
        return self.placement[each.stage] if each.kind in STAGE_KINDS else each.stage

    def check(self) -> None:
        """Raises ScheduleError unless every pass stands exactly once, on its rank, in an order that can run to the end
        when each rank runs its passes one after the other."""
        wanted = set(all_passes(self))
        for rank, order in enumerate(self.orders):
            for each in order:
                if each not in wanted:
                    raise ScheduleError(
                        f"{self.name}: rank {rank} runs {each}, which is unknown or stands twice",
                        remedy="list every pass once",
                    )
                if self.rank_of(each) != rank:
                    raise ScheduleError(
                        f"{self.name}: rank {rank} runs {each}, which belongs to rank {self.rank_of(each)}",
                        remedy="put each pass on its stage's rank",
                    )
                wanted.remove(each)
        if wanted:
            raise ScheduleError(
                f"{self.name}: no rank runs {min(wanted)} and {len(wanted) - 1} more", remedy="list every pass once"
            )
        run = _run(self)
        if len(run) < sum(map(len, self.orders)):
            heads = [
                str(order[at]) for order, at in zip(self.orders, _progress(self, run), strict=True) if at < len(order)
            ]
            raise ScheduleError(
                f"{self.name}: the ranks wait for each other, at {', '.join(heads)}",
                remedy="move a pass behind those it waits for",
            )


def all_passes(schedule: Schedule) -> Iterator[Pass]:
    """Every pass that the schedule must have."""
    kinds = ("F", "I", "W") if schedule.split_backward else ("F", "B")
    vocabulary = (("S", "T") if schedule.vocabulary else ()) + (("E", "D") if schedule.embedding else ())
    for microbatch in range(schedule.microbatches):
        for stage in range(schedule.stages):
            yield from (Pass(kind, stage, microbatch) for kind in kinds)
        for rank in range(schedule.ranks):
            yield from (Pass(kind, rank, microbatch) for kind in vocabulary)


def needs(schedule: Schedule, each: Pass) -> list[Pass]:
    """The passes that must have ended before this one begins, wherever they run. What stands between them (a transfer,
    a collective) is a matter of cost, see ``steps``."""
    kind, stage, microbatch = each
    ranks = range(schedule.ranks)

    def of_all(wanted: str) -> list[Pass]:
        return [Pass(wanted, rank, microbatch) for rank in ranks]

    back = schedule.backward
    if kind == "F":
        if stage:
            return [Pass("F", stage - 1, microbatch)]
        return of_all("E") if schedule.embedding else []
    if kind in ("B", "I"):
        if stage < schedule.last:
            return [Pass(back, stage + 1, microbatch), Pass("F", stage, microbatch)]
        if not schedule.vocabulary:
            return [Pass("F", stage, microbatch)]
        return of_all("S" if schedule.vocabulary == "one-barrier" else "T")
    if kind == "W":
        return [Pass("I", stage, microbatch)]
    if kind == "S":
        return [Pass("F", schedule.last, microbatch)]
    if kind == "T":
        return of_all("S")
    if kind == "D":
        return [Pass(back, 0, microbatch)]
    return []


def live_limit(schedule: Schedule) -> tuple[int, ...]:
    """Most (stage, microbatch) pairs that are live on each rank at once, in the order of its list: from F to the end of
    B (of W, where backward is split)."""
    end = schedule.end_kind
    found = []
    for order in schedule.orders:
        live = most = 0
        for each in order:
            live += each.kind == "F"
            most = max(most, live)
            live -= each.kind == end
        found.append(most)
    return tuple(found)


def topological(schedule: Schedule) -> list[Pass]:
    """All passes in an order that respects the lists and ``needs``. Raises ScheduleError when there is none."""
    schedule.check()
    return _run(schedule)


def _run(schedule: Schedule) -> list[Pass]:
    """As many passes as can be run, each rank in the order of its list."""
    rank_of_waiting: dict[Pass, list[int]] = {}
    done: set[Pass] = set()
    at = [0] * schedule.ranks
    found: list[Pass] = []
    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        order = schedule.orders[rank]
        while at[rank] < len(order):
            each = order[at[rank]]
            missing = next((need for need in needs(schedule, each) if need not in done), None)
            if missing is not None:
                rank_of_waiting.setdefault(missing, []).append(rank)
                break
            done.add(each)
            found.append(each)
            at[rank] += 1
            ready.extend(rank_of_waiting.pop(each, ()))
    return found


def _progress(schedule: Schedule, run: list[Pass]) -> list[int]:
    done = set(run)
    return [sum(each in done for each in order) for order in schedule.orders]
