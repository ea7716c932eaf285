"""Where the tokens of a sequence lie in each value of a step, found from two traces: the whole sequence and one part.

The two graphs have the same ops; dimensions that differ hold tokens. That says where tokens are, not that an op leaves
each token to itself: for that every op needs a rule here, and one without is refused by name. Where a value has tokens
in two dimensions (scores), queries meet keys: these ops are an attention, and are split as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...errors import PipelineError
from ..pipeline.step_graph import StepGraph, aten, where_in_model

#: Ops that leave every element where it is, besides those that torch marks as pointwise.
_SAME = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.detach.default, aten.dropout.default, aten.detach_.default, aten.lift_fresh.default,
)  # fmt: skip
_RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.unflatten.int,
)  # fmt: skip
_PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.bmm.default)
#: Ops over one dimension (the argument's position) that must not be the tokens'.
_ALONG = {
    aten.slice.Tensor: 1, aten.select.int: 1, aten.split.Tensor: 2, aten.split_with_sizes.default: 2,
    aten.chunk.default: 2, aten.cat.default: 1, aten.softmax.int: 1, aten.log_softmax.int: 1, aten.mean.dim: 1,
    aten.sum.dim_IntList: 1, aten.amax.default: 1, aten.narrow.default: 1, aten.stack.default: 1,
    aten.cumsum.default: 1, aten.topk.default: 2, aten.var.correction: 1, aten.unbind.int: 1,
}  # fmt: skip
_NORMS = {aten.layer_norm.default: 1, aten.rms_norm.default: 1}
_ATTENTION = (aten.scaled_dot_product_attention.default,)


@dataclass(frozen=True)
class Tokens:
    """Dimension ``dimension`` holds the tokens, ``groups`` sequences one behind the other."""

    dimension: int
    groups: int = 1


class SequenceLayout:
    """``tokens``: node of the whole trace -> where its tokens are; ``wide``: values with tokens in two dimensions;
    ``outputs``: what an attention gives; ``whole``: nodes that every rank computes for all tokens (what depends on no
    parameter, or on no input).

    Raises PipelineError for an op whose tokens would not be independent.
    """

    def __init__(self, whole: StepGraph, part: StepGraph, parts: int) -> None:
        self.parts = parts
        self.nodes = whole.nodes
        others = part.nodes
        if [(node.op, str(node.target)) for node in self.nodes] != [(node.op, str(node.target)) for node in others]:
            raise PipelineError(
                f"the step's ops for a whole sequence are not those for one of {parts} parts",
                remedy="choose fewer ranks of cp, or a longer sequence",
            )
        self.twin = dict(zip(self.nodes, others, strict=True))
        self.whole = _whole(whole)
        self.tokens: dict[Node, Tokens] = {}
        self.wide: set[Node] = set()
        self.outputs: dict[Node, Tokens] = {}
        result = whole.result
        for node in self.nodes:
            if node.op == "call_function" and node not in self.whole:
                self._visit(node, result)

    def changed(self, node: Node) -> list[int]:
        """Dimensions of a tensor (of a tuple's first) that differ between the traces."""
        mine, other = _tensor(node), _tensor(self.twin[node])
        if mine is None or other is None:
            return []
        if mine.dim() != other.dim():
            self._refuse(node, "it has other dimensions for a part of the sequence")
        found = [at for at in range(mine.dim()) if mine.shape[at] != other.shape[at]]
        if any(mine.shape[at] != self.parts * other.shape[at] for at in found):
            self._refuse(node, f"of {mine.shape[found[0]]} tokens no whole share comes on each of {self.parts} ranks")
        return found

    def _visit(self, node: Node, result: Node) -> None:
        changed = self.changed(node)
        sharded = [each for each in node.all_input_nodes if each not in self.whole]
        if len(changed) > 2 or (len(changed) == 2 and not sharded):
            self._refuse(node, "tokens meet in more than two dimensions")
        if len(changed) == 2:
            self.wide.add(node)
            return
        if node.target in _ATTENTION or any(each in self.wide for each in sharded):
            if len(changed) != 1:
                self._refuse(node, "an attention's output has no tokens")
            self.outputs[node] = self.tokens[node] = Tokens(changed[0])
            return
        if node is result:
            self._loss(node)
            return
        if not changed:
            if _tensor(node) is not None:
                self._refuse(node, "it takes all tokens together")
            return
        self.tokens[node] = Tokens(changed[0], self._groups(node, changed[0]))

    def _loss(self, node: Node) -> None:
        rows = node.args[0]
        if node.target is not aten.cross_entropy_loss.default or self.tokens.get(rows) is None:  # type: ignore[arg-type]
            self._refuse(node, "the loss is not a cross-entropy of the tokens")
        if self.tokens[rows].dimension != 0 or _tensor(rows).dim() != 2:  # type: ignore[index, union-attr, arg-type]
            self._refuse(node, "the loss's rows are not [tokens, classes]")

    def _groups(self, node: Node, dimension: int) -> int:
        """How many sequences lie behind each other in the dimension; refuses ops that mix tokens."""
        target: Any = node.target
        sharded = [(each, self.tokens[each]) for each in node.all_input_nodes if each in self.tokens]
        mine = _tensor(node)
        assert mine is not None
        if not sharded:
            if target is aten.embedding.default:
                indices = _tensor(node.args[1])  # type: ignore[arg-type]
                assert indices is not None
                return self.groups_of_whole(node.args[1], dimension)  # type: ignore[arg-type]
            self._refuse(node, "it makes tokens of what has none")
        first, tokens = sharded[0]
        theirs = _tensor(first)
        assert theirs is not None
        if target in _RESHAPES:
            period = theirs.shape[tokens.dimension] // tokens.groups * math.prod(theirs.shape[tokens.dimension + 1 :])
            groups, rest = divmod(mine.shape[dimension] * math.prod(mine.shape[dimension + 1 :]), period)
            if rest or not groups or mine.shape[dimension] % groups:
                self._refuse(node, "it mixes tokens with other dimensions")
            return groups
        if target in _PRODUCTS:
            if len(sharded) > 1 or dimension != tokens.dimension or tokens.dimension == theirs.dim() - 1:
                self._refuse(node, "it adds up over tokens")
        elif target in _ALONG:
            self._along(node, _ALONG[target], theirs.dim(), mine.dim(), tokens)
        elif target in _NORMS:
            if tokens.dimension >= theirs.dim() - len(node.args[_NORMS[target]]):  # type: ignore[arg-type]
                self._refuse(node, "it normalizes over tokens")
        elif target in (aten.transpose.int, aten.permute.default, aten.t.default, aten.expand.default):
            pass  # the dimension that differs is where the tokens have gone
        elif getattr(target, "__name__", "") == "getitem":
            pass
        elif target in _SAME or torch.Tag.pointwise in getattr(target, "tags", ()):
            for each, place in sharded:
                if _tensor(each).dim() - place.dimension != mine.dim() - dimension:  # type: ignore[union-attr]
                    self._refuse(node, "tokens of its operands lie in different dimensions")
                if place.groups != tokens.groups:
                    self._refuse(node, "its operands have their tokens in different orders")
        else:
            self._refuse(node, "there is no rule that it leaves each token to itself")
        return tokens.groups

    def _along(self, node: Node, position: int, before: int, after: int, tokens: Tokens) -> None:
        name = "dim" if position < len(node.args) else ""
        given = node.args[position] if name else node.kwargs.get("dim", 0)
        places = given if isinstance(given, list | tuple) else [given]
        size = after if node.target is aten.stack.default else before
        if any(int(each) % size == tokens.dimension for each in places):  # type: ignore[arg-type]
            self._refuse(node, "it works along the tokens")

    def groups_of_whole(self, node: Node, dimension: int) -> int:
        """Of a value that every rank has: as many sequences as its dimension holds."""
        tensor = _tensor(node)
        assert tensor is not None
        groups, rest = divmod(int(tensor.shape[dimension]), self.sequence)
        if rest or not groups:
            self._refuse(node, f"its {tensor.shape[dimension]} tokens are no whole sequences")
        return groups

    @property
    def sequence(self) -> int:
        """Tokens of a whole sequence: the smallest size that is cut."""
        return min(
            int(tensor.shape[at])
            for node in self.nodes
            if node.op == "placeholder" and (tensor := _tensor(node)) is not None
            for at in self.changed(node)
        )

    def _refuse(self, node: Node, why: str) -> None:
        raise PipelineError(
            f"the sequence cannot be split over devices: {why} ({node.target})", where=where_in_model(node),
            remedy="shift labels instead of logits, or do without cp",
        )  # fmt: skip


def _whole(graph: StepGraph) -> set[Node]:
    """What depends on no parameter, or on nothing but parameters."""
    from ..pipeline.step_graph import free_nodes

    found = free_nodes(graph)
    alone: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in graph.parameters:
                alone.add(node)
        elif node.op == "call_function" and all(each in alone for each in node.all_input_nodes):
            alone.add(node)
    return found | alone


def _tensor(node: Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        value = next((each for each in value if isinstance(each, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None
