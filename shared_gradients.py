"""Gradients that layers add up before one sum reduces them, as a sum for each layer.

A bias that all layers share (T5's relative positions) gets ``G = reduce(dS1 + dS2 + ...)``: one sum over wide tensors
of every layer, which ties all layers together. It is ``reduce(dS1) + reduce(dS2) + ...``, in which each layer's wide
tensor is reduced where it is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from . import torch_internals

aten = torch.ops.aten

#: Ops that sum up what they are given, and which of their operands that is.
_SUMS: dict[Any, int] = {
    aten.sum.dim_IntList: 0,
    aten.index_put.default: 2,
    aten._unsafe_masked_index_put_accumulate.default: 3,
}
#: Ops that only change how a tensor is seen.
_VIEWS = (
    aten.alias.default, aten.clone.default, aten.permute.default, aten.reshape.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.transpose.int, aten.unsqueeze.default, aten.view.default,
)  # fmt: skip
#: Of the tensors that are added up; narrower ones tie nothing together.
_LEAST_BYTES = 1 << 20


@dataclass(frozen=True)
class Spread:
    """``sums``: the reductions, one a term, that ``total`` adds up in place of ``whole``."""

    whole: fx.Node
    total: fx.Node
    sums: tuple[fx.Node, ...]

    def is_in(self, values: Collection[str]) -> bool:
        return all(each.name in values for each in self.sums)

    def undo(self) -> None:
        self.total.replace_all_uses_with(self.whole)


def spread_sums(graph: fx.Graph) -> list[Spread]:
    """Every such sum of the graph spread over its terms. The whole sums stay, unread; dead-code elimination removes
    them, or what takes their place if it is undone."""
    found = []
    for node in [each for each in graph.nodes if _sums_up(each)]:
        spread = _spread(graph, node)
        if spread is not None:
            found.append(spread)
    return found


def _sums_up(node: fx.Node) -> bool:
    if node.target == aten.index_put.default and not (len(node.args) > 3 and node.args[3]):
        return False
    return node.target in _SUMS and (node.target == aten.sum.dim_IntList or _is_zero(node.args[0]))


def _is_zero(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target == aten.full.default and bool(node.args[1] == 0)


def _spread(graph: fx.Graph, node: fx.Node) -> Spread | None:
    position = _SUMS[node.target]
    views: list[fx.Node] = []
    at = node.args[position]
    while isinstance(at, fx.Node) and at.target in _VIEWS and len(at.users) == 1:
        views.append(at)
        at = at.args[0]
    if not isinstance(at, fx.Node):
        return None
    terms = list(_terms(at))
    value = at.meta["val"]
    if len(terms) < 2 or value.numel() * value.element_size() < _LEAST_BYTES:
        return None
    try:
        sums = []
        for term in terms:
            seen = term
            for view in reversed(views):
                seen = _copy(graph, node, view, 0, seen)
            sums.append(_copy(graph, node, node, position, seen))
        total = sums[0]
        for each in sums[1:]:
            total = _call(graph, node, aten.add.Tensor, (total, each))
    except RuntimeError:  # a term does not lie in memory as their total does
        return None
    if (total.meta["val"].dtype, total.meta["val"].stride()) != (node.meta["val"].dtype, node.meta["val"].stride()):
        return None
    node.replace_all_uses_with(total)
    return Spread(node, total, tuple(sums))


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    """What plain additions of equal tensors that nothing else reads add up to ``node``."""
    kind = node.meta["val"]
    operands = [each for each in node.args if isinstance(each, fx.Node)]
    same = all((each.meta["val"].shape, each.meta["val"].dtype) == (kind.shape, kind.dtype) for each in operands)
    if node.target == aten.add.Tensor and len(operands) == 2 and not node.kwargs and len(node.users) == 1 and same:
        for each in operands:
            yield from _terms(each)
    else:
        yield node


def _copy(graph: fx.Graph, before: fx.Node, node: fx.Node, position: int, operand: fx.Node) -> fx.Node:
    args = (*node.args[:position], operand, *node.args[position + 1 :])
    return _call(graph, before, node.target, args, node.kwargs)


def _call(graph: fx.Graph, before: fx.Node, target: Any, args: tuple[Any, ...], named: Any = None) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(target, args, named or {})
    node.meta.update({key: value for key, value in before.meta.items() if key not in ("val", "tensor_meta")})
    given = fx.node.map_arg((args, named or {}), lambda operand: operand.meta["val"])
    gm: Any = graph.owning_module
    with torch_internals.fake_mode_of(gm):
        node.meta["val"] = target(*given[0], **given[1])
    return node
