"""The exchanges of an attention whose keys are split over devices, in two forms that give the same.

*Ring*: blocks of keys and values go round, point to point, while each rank computes on the block that it has; a rank's
queries stay. In the backward the blocks go round once more, their gradients with them, and end where they began.

*Tree*: queries are gathered, each rank computes the state of its own keys for all queries, and the states are merged by
reductions over the ranks, as those of a sharded vocabulary are; what returns in the backward is gathered likewise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..monoid_state import State, merge, merge_pair
from ..rank_watch import RankWatch
from .attention import SplitAttention

FORMS = ("ring", "tree")
_OPERATIONS: dict[str, Any] = {"max": "MAX", "min": "MIN", "sum": "SUM"}


class SequenceGroup:
    """The ranks that share a sequence, in the order of their tokens. ``watch`` explains failures, if there is one;
    ``sent``: bytes that this rank has put on the wire, point to point or as its share of what is gathered and
    reduced (an all-reduce counts twice)."""

    def __init__(self, group: dist.ProcessGroup, watch: RankWatch | None = None) -> None:
        self.group, self.watch = group, watch
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0

    def _waiting(self, what: str) -> contextlib.AbstractContextManager[None]:
        if self.watch is None:
            return contextlib.nullcontext()
        return self.watch.waiting(f"{self.watch.state.place}, {what}")

    def pass_on(self, tensors: Sequence[torch.Tensor]) -> Passing:
        """Send the tensors to the next rank and receive those of the one before, which are alike."""
        sends = [tensor.contiguous() for tensor in tensors]
        received = [torch.empty_like(tensor) for tensor in sends]
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.ranks)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.ranks)
        operations = []
        for number, (out, into) in enumerate(zip(sends, received, strict=True)):
            operations.append(dist.P2POp(dist.isend, out, after, self.group, tag=number))
            operations.append(dist.P2POp(dist.irecv, into, before, self.group, tag=number))
            self.sent += out.numel() * out.element_size()
        with self._waiting("handing keys on"):
            works = dist.batch_isend_irecv(operations) if operations else []
        return Passing(self, works, sends, received)

    def gather(self, tensor: torch.Tensor, dimension: int) -> torch.Tensor:
        """All ranks' parts, one behind the other along a dimension."""
        own = tensor.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        with self._waiting("at gathering queries"):
            dist.all_gather(parts, own, group=self.group)
        self.sent += own.numel() * own.element_size() * (self.ranks - 1)
        return torch.cat(parts, dimension)

    def all_reduce(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        """The tensor, reduced over the ranks in place."""
        with self._waiting("at merging states"):
            dist.all_reduce(tensor, getattr(dist.ReduceOp, _OPERATIONS[operation]), group=self.group)
        self.sent += 2 * tensor.numel() * tensor.element_size() * (self.ranks - 1) // self.ranks
        return tensor


class Passing:
    """Tensors on their way."""

    def __init__(
        self, ring: SequenceGroup, works: Sequence[Any], held: list[torch.Tensor], received: list[torch.Tensor]
    ) -> None:
        self._ring, self._works, self._held, self._received = ring, works, held, received

    def wait(self) -> list[torch.Tensor]:
        with self._ring._waiting("at keys that are handed on"):
            for work in self._works:
                work.wait()
        return self._received


class Ring(torch.autograd.Function):
    """(attention, group, operands) -> result."""

    @staticmethod
    def forward(ctx: Any, attention: SplitAttention, group: SequenceGroup, *operands: torch.Tensor) -> torch.Tensor:
        tensors = attention.by_ranks(operands)
        own, places = attention.span(group.rank), attention.travelling
        state: State | None = None
        values = None
        for hop in range(group.ranks):
            last = hop == group.ranks - 1
            passing = None if last else group.pass_on([tensors[at] for at in places])
            values = attention.values(tensors, own, attention.span((group.rank - hop) % group.ranks))
            block = attention.state(values)
            state = block if state is None else merge_pair(attention.cascade.monoid, state, block, values)
            if passing is not None:
                tensors = _replaced(tensors, places, passing.wait())
        assert state is not None and values is not None
        ctx.attention, ctx.group, ctx.names = attention, group, tuple(state)
        ctx.save_for_backward(*operands, *state.values())
        return attention.outputs(state, values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        attention, group, operands, state = _restored(ctx)
        tensors = attention.by_ranks(operands)
        own, travelling = attention.span(group.rank), attention.travelling
        values = attention.values(tensors, own, own)
        of_state = attention.state_gradient(state, values, gradients[0])
        places = sorted({*attention.asking, *travelling})
        found = {at: torch.zeros_like(tensors[at]) for at in places}
        for hop in range(group.ranks):
            last = hop == group.ranks - 1
            keys = attention.span((group.rank - hop) % group.ranks)
            passing = None if last else group.pass_on([tensors[at] for at in travelling])
            added = attention.block_gradients(tensors, own, keys, state, of_state)
            for at, value in zip(places, added, strict=True):
                found[at] = found[at] + value
            # The gradients of a block follow it, one hop after the block itself, and go home at the end.
            home = group.pass_on([found[at] for at in travelling]) if group.ranks > 1 else None
            if passing is not None:
                tensors = _replaced(tensors, travelling, passing.wait())
            if home is not None:
                found |= dict(zip(travelling, home.wait(), strict=True))
        return None, None, *_like(operands, found)


class Tree(torch.autograd.Function):
    """(attention, group, operands) -> result."""

    @staticmethod
    def forward(ctx: Any, attention: SplitAttention, group: SequenceGroup, *operands: torch.Tensor) -> torch.Tensor:
        own = attention.span(group.rank)
        tensors = _all_queries(attention, group, attention.by_ranks(operands))
        values = attention.values(tensors, attention.everyone, own)
        merged = merge(attention.cascade.monoid, attention.state(values), values, group.all_reduce)
        ctx.attention, ctx.group, ctx.names = attention, group, tuple(merged)
        ctx.save_for_backward(*operands, *merged.values())
        mine = attention.values(attention.by_ranks(operands), own, own)
        return attention.outputs(_rows(attention, merged, group.rank), mine)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        attention, group, operands, merged = _restored(ctx)
        own = attention.span(group.rank)
        mine = attention.by_ranks(operands)
        state = _rows(attention, merged, group.rank)
        of_rows = attention.state_gradient(state, attention.values(mine, own, own), gradients[0])
        of_state = {
            component.name: group.gather(of_rows[component.name], component.indices.index(attention.query))
            if attention.query in component.indices
            else of_rows[component.name]
            for component in attention.cascade.monoid.components
            if component.name in of_rows
        }
        tensors = _all_queries(attention, group, mine)
        added = attention.block_gradients(tensors, attention.everyone, own, merged, of_state)
        places = sorted({*attention.asking, *attention.travelling})
        found = dict(zip(places, added, strict=True))
        for at in attention.asking:
            whole = group.all_reduce(found[at].contiguous(), "sum")
            found[at] = whole.narrow(attention.axis(at, attention.query), own.first, own.count)
        return None, None, *_like(operands, found)


def _all_queries(
    attention: SplitAttention, group: SequenceGroup, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    found = list(tensors)
    for at in attention.asking:
        found[at] = group.gather(found[at], attention.axis(at, attention.query))
    return found


def _rows(attention: SplitAttention, merged: State, part: int) -> State:
    """The state of one rank's queries."""
    span = attention.span(part)
    return {
        component.name: merged[component.name].narrow(component.indices.index(attention.query), span.first, span.count)
        if attention.query in component.indices
        else merged[component.name]
        for component in attention.cascade.monoid.components
    }


def _replaced(
    tensors: Sequence[torch.Tensor], places: Sequence[int], others: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    table = dict(zip(places, others, strict=True))
    return [table.get(at, tensor) for at, tensor in enumerate(tensors)]


def _restored(ctx: Any) -> tuple[SplitAttention, SequenceGroup, list[torch.Tensor], State]:
    count = len(ctx.attention.operands)
    saved = ctx.saved_tensors
    return ctx.attention, ctx.group, list(saved[:count]), dict(zip(ctx.names, saved[count:], strict=True))


def _like(operands: Sequence[torch.Tensor], found: dict[int, torch.Tensor]) -> list[torch.Tensor | None]:
    """Gradients in the operands' own shapes and types."""
    return [
        found[at].reshape(operand.shape).to(operand.dtype) if at in found else None
        for at, operand in enumerate(operands)
    ]
