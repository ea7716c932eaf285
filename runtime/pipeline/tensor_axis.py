"""Tensor parallelism with sequence parallelism of a captured step: which products are split how, found in its graph.

A value is either a *stream* (each rank has some of the tokens) or *split* (each has some of the features). A product
with a matrix of parameters takes a stream to a split value, by columns, after the tokens were gathered; or a split one
to a stream, by rows, its partial sums scattered over the tokens (Korthikanti et al., 2022). Lookups give streams, what
lies between keeps what it gets. So pairs of products and the collectives around them follow from the graph alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.fx import Node

from ...errors import PipelineError
from .step_graph import StepGraph, aten, free_nodes, where_in_model

_PRODUCTS = {
    aten.linear.default: (0, 1), aten.matmul.default: (0, 1), aten.mm.default: (0, 1), aten.addmm.default: (1, 2),
}  # fmt: skip
_RESHAPES = (aten.view.default, aten.reshape.default, aten.unflatten.int, aten._unsafe_view.default)


@dataclass(frozen=True)
class Collective:
    """``kind`` as in ``cost_model.collectives``, of so many bytes in all."""

    kind: str
    size: float


class TensorAxis:
    """``forward`` and ``backward``: node -> the collectives around it. ``split``: placeholders of the parameters that
    are divided, of these ``columns`` and ``rows`` the matrices of products; ``head``: the matrix of the loss's.

    Raises PipelineError for a model that ``parts`` ranks cannot share, with the op.
    """

    def __init__(self, graph: StepGraph, parts: int) -> None:
        self.parts = parts
        self.forward: dict[str, list[Collective]] = {}
        self.backward: dict[str, list[Collective]] = {}
        self.split: set[str] = set()
        self.columns: dict[str, None] = {}
        self.rows: dict[str, None] = {}
        self.head = ""
        self._matrix: dict[Node, str] = {}
        self._parameters = set(graph.parameters)
        self._state: dict[Node, str] = {}
        self._gathered: set[Node] = set()
        free = free_nodes(graph)
        for node in graph.nodes:
            if node.op == "call_function" and node not in free:
                self._visit(node, free)
        if not any(each.kind == "reduce_scatter" for found in self.forward.values() for each in found):
            raise PipelineError(
                f"tp={parts} has nothing to share: no two products with parameters follow each other",
                remedy="plan without tp",
            )

    def _visit(self, node: Node, free: set[Node]) -> None:
        weight = self._weight(node)
        states = [self._state[each] for each in node.all_input_nodes if each in self._state]
        if weight is not None:
            self._product(node, weight)
        elif node.target is aten.embedding.default:
            self._divide(node, self._source(node.args[0]), 0)
            self._note(node, [Collective("reduce_scatter", _bytes(node))], [Collective("all_gather", _bytes(node))])
            self._state[node] = "stream"
        elif node.target is aten.cross_entropy_loss.default:
            rows = node.args[0]
            if isinstance(rows, Node) and self._state.get(rows) == "split":
                tokens = rows.meta["val"].numel() // rows.meta["val"].shape[-1] * 4.0
                self._note(node, [Collective("all_reduce", tokens)] * 3, [])
                while rows not in self._matrix and rows.all_input_nodes:
                    rows = rows.all_input_nodes[0]
                self.head = self._matrix.get(rows, "")
        elif any(each.name in self._parameters and _dims(each) > 2 for each in node.all_input_nodes):
            self._refuse(node, "a product with a stack of matrices (experts) is not split", "use ep for experts")
        elif states:
            self._between(node, states)

    def _between(self, node: Node, states: list[str]) -> None:
        state = "split" if "split" in states else "stream"
        if state == "split":
            for each in node.all_input_nodes:  # a stream that meets features is gathered first
                if self._state.get(each) == "stream" and _dims(each) and each.meta["val"].shape[-1] > 1:
                    self._gather(node, each)
            if node.target in _RESHAPES:
                self._heads(node)
        self._state[node] = state

    def _product(self, node: Node, weight: Node) -> None:
        source = node.args[_PRODUCTS[node.target][0]]  # type: ignore[index]
        assert isinstance(source, Node)
        transposed = node.target is aten.linear.default  # its weight is [out, in]
        if self._state.get(source) == "split":
            self._divide(node, weight, 1 if transposed else 0)
            self.rows[self._source(weight).name] = None
            size = _bytes(node)
            self._note(node, [Collective("reduce_scatter", size)], [Collective("all_gather", size)])
            self._state[node] = "stream"
            return
        self._divide(node, weight, 0 if transposed else 1)
        self._matrix[node] = self._source(weight).name
        self.columns[self._matrix[node]] = None
        self._gather(node, source)
        self._state[node] = "split"

    def _gather(self, node: Node, source: Node) -> None:
        """The tokens of a stream, once for all that read it; its gradient's partial sums are scattered, and for the
        weights' gradients it is gathered once more."""
        if source not in self._gathered:
            self._gathered.add(source)
            size = _bytes(source)
            self._note(node, [Collective("all_gather", size)],
                       [Collective("reduce_scatter", size), Collective("all_gather", size)])  # fmt: skip

    def _note(self, node: Node, forward: list[Collective], backward: list[Collective]) -> None:
        self.forward.setdefault(node.name, []).extend(forward)
        self.backward.setdefault(node.name, []).extend(backward)

    def _divide(self, node: Node, weight: Node, dimension: int) -> None:
        size = int(weight.meta["val"].shape[dimension])
        if node.target is not aten.embedding.default and size % self.parts:
            self._refuse(node, f"tp={self.parts} does not divide the {size} features of {weight.name}")
        self.split.add(self._source(weight).name)

    def _heads(self, node: Node) -> None:
        """Where features are taken apart into heads, each rank has whole ones."""
        source = node.args[0]
        assert isinstance(source, Node)
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if len(after) == len(before) + 1 and after[-2] * after[-1] == before[-1] and after[-2] % self.parts:
            self._refuse(node, f"tp={self.parts} does not divide {after[-2]} heads")

    def _weight(self, node: Node) -> Node | None:
        """The matrix of parameters that the op multiplies with."""
        if node.target not in _PRODUCTS:
            return None
        found = node.args[_PRODUCTS[node.target][1]]
        if not isinstance(found, Node) or _dims(found) != 2 or self._source(found).name not in self._parameters:
            return None
        return found

    def _source(self, node: Any) -> Node:
        """The parameter that a view of it shows."""
        found = node
        while isinstance(found, Node) and found.target in (aten.t.default, aten.transpose.int, aten.detach.default):
            found = found.args[0]
        assert isinstance(found, Node)
        return found

    def _refuse(self, node: Node, why: str, remedy: str = "choose another tp") -> NoReturn:
        raise PipelineError(f"the step cannot be shared over tp: {why}", where=where_in_model(node), remedy=remedy)


def _dims(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _bytes(node: Node) -> float:
    value = node.meta["val"]
    return float(value.numel() * value.element_size())
