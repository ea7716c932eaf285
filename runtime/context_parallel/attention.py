"""An attention whose keys are split over devices: what each computes of a block of keys, and how blocks are merged.

All of it is the cascade's (``passes.pipeline_parallel.split_cascade``): ``before`` gives the scores of a block, the
monoid's elements its state, ``merge`` the state of several blocks, ``finals`` and ``after`` the outputs. Nothing here
knows that it is a softmax.

Backward. The merged state is a sum of what each block adds once the references (maxima) are the merged ones, and the
outputs do not depend on which references these are. So with the references held fixed the gradients of a block follow
from that block and the outputs' gradient alone: blocks are computed again, one at a time, wherever they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from ...codegen.einsums import Values, reduce
from ...errors import PipelineError
from ...ir.cascade import accesses, tensor_name
from ...passes.pipeline_parallel.split_cascade import SplitCascade
from ..monoid_state import State, local_state, results


@dataclass(frozen=True)
class Operand:
    """A tensor that the attention reads. ``ranks`` and their whole ``sizes`` in its own order; ``sharded``: a device
    has the part of its own tokens, else all of it."""

    tensor: str
    ranks: tuple[sympy.Symbol, ...]
    sizes: tuple[int, ...]
    sharded: bool


@dataclass(frozen=True)
class Span:
    """Tokens ``first`` to ``first + count``."""

    first: int
    count: int


@dataclass(frozen=True)
class SplitAttention:
    """``query`` and ``key`` are the ranks of the tokens that ask and that are asked. ``result``: name, ranks and dtype
    of the output, ``shape`` its shape on one of ``parts`` devices, ``dimension`` that of the tokens in it. ``sizes``:
    whole sizes of all ranks."""

    cascade: SplitCascade
    operands: tuple[Operand, ...]
    query: sympy.Symbol
    key: sympy.Symbol
    result: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sizes: Mapping[str, int]
    parts: int

    def check(self) -> None:
        """Raises PipelineError for a state that cannot be merged and differentiated block by block."""
        table = {component.name: component for component in self.cascade.monoid.components}
        for component in table.values():
            if component.reduction not in ("sum", "max", "min"):
                self._refuse(f"{component.name} is a {component.reduction or 'running reference'}")
            read = {tensor_name(item) for item in accesses(component.element)} & set(table)
            if any(table[name].reduction == "sum" for name in read):
                self._refuse(f"{component.name} is relative to a sum over all keys")

    def _refuse(self, why: str) -> None:
        raise PipelineError(
            f"the attention that gives {self.result} cannot be split over devices: {why}",
            remedy="do without cp, or write it as a softmax of scores",
        )

    @property
    def everyone(self) -> Span:
        """The tokens of all devices."""
        return Span(0, self.sizes[self.query.name])

    @property
    def tokens(self) -> int:
        """Of one device."""
        return self.sizes[self.query.name] // self.parts

    def span(self, part: int) -> Span:
        return Span(part * self.tokens, self.tokens)

    @property
    def travelling(self) -> tuple[int, ...]:
        """Positions of the operands that have the keys' tokens."""
        return tuple(at for at, each in enumerate(self.operands) if each.sharded and self.key in each.ranks)

    @property
    def asking(self) -> tuple[int, ...]:
        """Positions of the operands that have the queries' tokens."""
        return tuple(at for at, each in enumerate(self.operands) if each.sharded and self.query in each.ranks)

    def by_ranks(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The operands with a dimension for each rank."""
        found = []
        for operand, tensor in zip(self.operands, tensors, strict=True):
            shape = [
                size // self.parts if operand.sharded and rank in (self.query, self.key) else size
                for rank, size in zip(operand.ranks, operand.sizes, strict=True)
            ]
            found.append(tensor.reshape(shape))
        return found

    def axis(self, position: int, rank: sympy.Symbol) -> int:
        """The dimension of an operand (by ranks) that has the tokens."""
        return self.operands[position].ranks.index(rank)

    def values(self, tensors: Sequence[torch.Tensor], queries: Span, keys: Span) -> Values:
        """What one block reads: operands by ranks, the sharded ones of these tokens, the others whole."""
        spans = {self.query: queries, self.key: keys}
        given = {}
        for operand, tensor in zip(self.operands, tensors, strict=True):
            for rank, span in spans.items():
                if not operand.sharded and rank in operand.ranks:
                    tensor = tensor.narrow(operand.ranks.index(rank), span.first, span.count)
            given[operand.tensor] = tensor
        first = {rank.name: span.first for rank, span in spans.items()}
        extents = {**self.sizes, **{rank.name: span.count for rank, span in spans.items()}}
        return Values(given, first, self.sizes, extents)

    def state(self, values: Values) -> State:
        """The state of a block of keys."""
        return local_state(self.cascade.monoid, self._scored(values))

    def _scored(self, values: Values) -> Values:
        for einsum in self.cascade.before:
            value = reduce(einsum.body, einsum.reduction, einsum.kept, einsum.reduced, values)
            values = values.with_tensors({einsum.output: value})
        return values

    def outputs(self, state: State, values: Values) -> torch.Tensor:
        """The result, from the state of all keys."""
        known = results(self.cascade.monoid, state, values)
        for einsum in self.cascade.after:
            value = reduce(einsum.body, einsum.reduction, einsum.kept, einsum.reduced, known)
            known = known.with_tensors({einsum.output: value})
        return known.tensor(self.result).reshape(self.shape).to(self.dtype)

    def state_gradient(self, state: State, values: Values, gradient: torch.Tensor) -> State:
        """Gradients of the merged state's sums, from that of the result."""
        names = [each.name for each in self.cascade.monoid.components if each.reduction == "sum"]
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_(name in names) for name, value in state.items()}
            found = torch.autograd.grad(
                self.outputs(leaves, values), [leaves[name] for name in names], gradient, allow_unused=True
            )
        return {
            name: torch.zeros_like(state[name]) if value is None else value
            for name, value in zip(names, found, strict=True)
        }

    def block_gradients(
        self, tensors: Sequence[torch.Tensor], queries: Span, keys: Span, merged: State, gradient: State
    ) -> list[torch.Tensor]:
        """Gradients of ``tensors`` (all sharded operands, by ranks) that a block of keys adds. ``merged``: the merged
        references; ``gradient``: of the merged sums."""
        places = sorted({*self.asking, *self.travelling})
        with torch.enable_grad():
            leaves = [
                tensor.detach().requires_grad_(at in places and tensor.is_floating_point())
                for at, tensor in enumerate(tensors)
            ]
            values = self._scored(self.values(leaves, queries, keys)).with_tensors(merged)
            monoid = self.cascade.monoid
            sums, cotangents = [], []
            for component in monoid.components:
                if component.reduction == "sum":
                    element = monoid.rename(component.element, "", "")
                    reduced = (monoid.rank, *component.inner)
                    sums.append(reduce(element, "sum", component.indices, reduced, values))
                    cotangents.append(gradient[component.name])
            found = torch.autograd.grad(sums, [leaves[at] for at in places], cotangents, allow_unused=True)
        return [
            torch.zeros_like(tensors[at]) if value is None else value for at, value in zip(places, found, strict=True)
        ]
