"""Rows that change ranks, differentiably: one all-to-all of torch.distributed with uneven splits; bytes are counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..rank_watch import RankWatch


class Wire:
    """A group with its watch, whose own group may be larger. ``sent``: bytes that this rank has sent to others;
    ``exchanges``: of rows, so far."""

    def __init__(self, group: dist.ProcessGroup, watch: RankWatch) -> None:
        self.group, self.watch = group, watch
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0
        self.exchanges = 0

    def all_to_all(self, values: torch.Tensor, send: list[int], receive: list[int], step: str) -> torch.Tensor:
        """Rows in order of the ranks they go to, ``send`` to each; gives those that come, ``receive`` from each."""
        result = values.new_empty((sum(receive), *values.shape[1:]))
        row = math.prod(values.shape[1:]) * values.element_size()
        self.sent += row * (sum(send) - send[self.rank])
        self.watch.collective(
            step, lambda: dist.all_to_all_single(result, values.contiguous(), receive, send, group=self.group)
        )
        return result


@dataclass(frozen=True)
class Route:
    """Where rows go, agreed by all ranks. ``order``: sorts this rank's rows by the rank they go to."""

    wire: Wire
    order: torch.Tensor
    send: list[int]
    receive: list[int]
    step: str

    def there(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows of each table to where they go; those that come are in order of the ranks they come from."""
        return _move([value[self.order] for value in values], self, self.send, self.receive)

    def back(self, values: torch.Tensor) -> torch.Tensor:
        """A row for each that came, back to the rank it came from, in the order in which they left."""
        (returned,) = _move([values], self, self.receive, self.send)
        return returned[torch.argsort(self.order)]


def route(wire: Wire, destination: torch.Tensor, step: str) -> Route:
    """Agree on an exchange: ``destination`` is the rank of each of this rank's rows."""
    counts = torch.bincount(destination, minlength=wire.ranks)
    ones = [1] * wire.ranks
    coming = wire.all_to_all(counts, ones, ones, step)
    wire.exchanges += 1
    return Route(wire, torch.argsort(destination, stable=True), counts.tolist(), coming.tolist(), step)


def _move(values: list[torch.Tensor], plan: Route, send: list[int], receive: list[int]) -> tuple[torch.Tensor, ...]:
    """Floating-point tables move as one node of the autograd graph: separate ones would meet in the backward in an
    order that depends on what a rank has to compute, and ranks would wait for each other crosswise."""
    real = [value for value in values if value.is_floating_point()]
    moved = iter(_Move.apply(plan.wire, send, receive, plan.step, *real) if real else ())  # type: ignore[no-untyped-call]
    return tuple(
        next(moved) if value.is_floating_point() else plan.wire.all_to_all(value, send, receive, plan.step)
        for value in values
    )


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, wire: Wire, send: list[int], receive: list[int], step: str, *values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.plan = wire, send, receive, step
        return tuple(wire.all_to_all(value, send, receive, step) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        wire, send, receive, step = ctx.plan
        step = f"the backward of {step}"
        return (None, None, None, None, *(wire.all_to_all(each, receive, send, step) for each in gradients))
