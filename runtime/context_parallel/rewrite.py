"""A training step's graph for one rank of a sequence that is split over devices.

rewrite: the graph of a whole sequence -> the graph of one part, in which masks, positions and targets are computed for
all tokens and this rank's taken, every attention is one call that exchanges keys with the other ranks, and all other
ops are those of the shorter sequence. It is a step graph like any other: a pipeline can be cut from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from ...errors import CascadeError, PipelineError
from ...ir.cascade import Cascade
from ...ir.graph import Graph as IrGraph
from ...passes.pipeline_parallel.split_cascade import SplitCascade, split_cascade
from ...passes.raising.guards import prepare
from ...passes.raising.raise_graph import Raised, raise_graph
from ...passes.rewrite_cascade import without_unread
from ..pipeline.step_graph import StepGraph, aten, where_in_model
from .attention import Operand, SplitAttention
from .exchange import FORMS, Ring, SequenceGroup, Tree
from .layout import SequenceLayout, Tokens

#: Gives the IR of a graph module (``frontend.fx_import.from_fx``).
Importer = Callable[[GraphModule], IrGraph]
_VIEWS = (
    aten.expand.default, aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.transpose.int,
    aten.permute.default, aten.contiguous.default, aten.clone.default,
)  # fmt: skip


def part_of_step(
    whole: StepGraph, part: StepGraph, parts: int, importer: Importer, group: SequenceGroup | None = None,
    form: str = "ring",
) -> StepGraph:  # fmt: skip
    """The graph of this rank's part. ``whole`` and ``part``: the step for a whole sequence, and for one of ``parts``.
    Without a group the graph is one to look at: its attentions cannot be called.

    Raises PipelineError naming what cannot be split, with its place in the model.
    """
    if form not in FORMS:
        raise PipelineError(f"attention over devices in the form {form!r}", remedy=f"one of {', '.join(FORMS)}")
    layout = SequenceLayout(whole, part, parts)
    return _Rewriter(whole, layout, importer, group, form).run()


def attentions(graph: StepGraph) -> list[SplitAttention]:
    """Those of a rewritten graph, in order."""
    found = (getattr(node.target, "attention", None) for node in graph.nodes)
    return [each for each in found if each is not None]


def take(value: torch.Tensor, dimension: int, groups: int, part: int, parts: int) -> torch.Tensor:
    """One part of the tokens of a dimension that holds ``groups`` sequences one behind the other."""
    tokens = value.shape[dimension] // groups
    apart = value.reshape(*value.shape[:dimension], groups, tokens, *value.shape[dimension + 1 :])
    return apart.narrow(dimension + 1, part * tokens // parts, tokens // parts).flatten(dimension, dimension + 1)


class _Rewriter:
    def __init__(
        self, whole: StepGraph, layout: SequenceLayout, importer: Importer, group: SequenceGroup | None, form: str
    ) -> None:
        self.source, self.layout, self.importer, self.group, self.form = whole, layout, importer, group, form
        self.part = group.rank if group is not None else 0
        self.graph = Graph()
        self.copies: dict[Node, Node] = {}
        self.taken: dict[tuple[Node, int, int], Node] = {}
        self.count = 0

    def run(self) -> StepGraph:
        for node in self.layout.nodes:
            if node.op == "output":
                self.graph.output(torch.fx.map_arg(node.args[0], lambda each: self.copies[each]))
            elif node in self.layout.whole or node.op in ("placeholder", "get_attr"):
                self._copy(node, node, lambda each: self.copies[each])
            elif node in self.layout.outputs:
                self.copies[node] = self._attention(node)
            elif node not in self.layout.wide:
                self._copy(node, self.layout.twin[node], partial(self._operand, reader=node))
        self.graph.eliminate_dead_code()
        module = GraphModule(self.source.module, self.graph, "ContextPart")
        return dataclasses.replace(self.source, module=module)

    def _copy(self, node: Node, like: Node, operand: Callable[[Node], Node]) -> None:
        """The node in the new graph, with the arguments that ``like`` has."""
        back = {twin: mine for mine, twin in self.layout.twin.items()} if like is not node else {}
        mapped = torch.fx.map_arg(like.args, lambda each: operand(back.get(each, each)))
        keywords = torch.fx.map_arg(like.kwargs, lambda each: operand(back.get(each, each)))
        made = self.graph.create_node(node.op, node.target, mapped, keywords, name=node.name)
        made.meta = dict(like.meta) | {key: value for key, value in node.meta.items() if key == "stack_trace"}
        self.copies[node] = made

    def _operand(self, node: Node, reader: Node) -> Node:
        """What an op of one part reads: of a value that is there for all tokens, this part."""
        if node not in self.layout.whole:
            return self.copies[node]
        changed = self.layout.changed(node)
        if not changed:
            return self.copies[node]
        place = self.layout.tokens.get(reader) or self._rows(reader)
        mine, value = node.meta["val"], reader.meta["val"]
        aligned = len(changed) == 1 and isinstance(value, torch.Tensor)
        if aligned and torch.Tag.pointwise in getattr(reader.target, "tags", ()):
            aligned = mine.dim() - changed[0] == value.dim() - place.dimension
        if not aligned:
            raise PipelineError(
                f"the sequence cannot be split over devices: {reader.target} reads {node.name} across tokens",
                where=where_in_model(reader), remedy="do without cp",
            )  # fmt: skip
        key = (node, changed[0], place.groups)
        if key not in self.taken:
            made = self.graph.call_function(
                take, (self.copies[node], changed[0], place.groups, self.part, self.layout.parts)
            )
            made.meta = dict(self.layout.twin[node].meta)
            self.taken[key] = made
        return self.taken[key]

    def _rows(self, loss: Node) -> Tokens:
        rows = loss.args[0]
        assert isinstance(rows, Node)
        return self.layout.tokens[rows]

    # --- attentions

    def _attention(self, node: Node) -> Node:
        inside, outside = self._segment(node)
        raised = self._raise(node, inside, outside)
        attention = self._split(node, raised, outside)
        attention.check()
        made = self.graph.call_function(_caller(attention, self.group, self.form, self.count),
                                        tuple(self.copies[each] for each in outside))  # fmt: skip
        self.count += 1
        made.meta = dict(self.layout.twin[node].meta) | {
            key: value for key, value in node.meta.items() if key == "stack_trace"
        }
        return made

    def _segment(self, output: Node) -> tuple[list[Node], list[Node]]:
        """The ops of an attention in order, and what they read."""
        inside = {output}
        waiting = [output]
        while waiting:
            for each in waiting.pop().all_input_nodes:
                if each in self.layout.wide and each not in inside:
                    inside.add(each)
                    waiting.append(each)
        for each in [operand for node in inside for operand in node.all_input_nodes]:
            if each not in inside and each not in self.layout.whole:
                inside |= set(_copies_of_less(each))
        order = [node for node in self.layout.nodes if node in inside]
        outside = dict.fromkeys(each for node in order for each in node.all_input_nodes if each not in inside)
        return order, list(outside)

    def _raise(self, output: Node, inside: Sequence[Node], outside: Sequence[Node]) -> Raised:
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in outside:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = {"val": node.meta["val"]}
        for node in inside:
            if node.target is aten.dropout.default:
                if node.args[1] and node.args[2]:
                    _refuse(node, "it has dropout")
                copies[node] = copies[node.args[0]]  # type: ignore[index]
                continue
            copies[node] = graph.node_copy(node, lambda each: copies[each])
            copies[node].meta = {"val": node.meta["val"]}
        graph.output((copies[output],))
        raised = raise_graph(self.importer(GraphModule(torch.nn.Module(), graph)))
        if raised.kept:
            name, why = next(iter(raised.kept.items()))
            _refuse(output, f"{name}: {why}")
        return raised

    def _split(self, output: Node, raised: Raised, outside: Sequence[Node]) -> SplitAttention:
        cascade = raised.cascade
        result = raised.tensor_of[output.name]
        indices = cascade.definitions[result].indices
        query = _rank_at(raised, result, indices, self.layout.outputs[output].dimension, output)
        ranks = {node: _ranks(raised, node, output) for node in outside}
        keys = set()
        for node in outside:
            if node in self.layout.whole:
                continue
            place = self.layout.tokens.get(node)
            if place is None:
                _refuse(output, f"{node.name} has no tokens")
            elif place.groups != 1:
                _refuse(output, f"{node.name} has several sequences in one dimension")
            else:
                name = raised.tensor_of[node.name]
                keys.add(_rank_at(raised, name, ranks[node], place.dimension, output))
        keys.discard(query)
        if len(keys) != 1:
            _refuse(output, "queries and keys cannot be told apart")
        key = keys.pop()
        try:
            split = _traversal(cascade, query, key, result)
        except CascadeError as error:
            raise PipelineError(
                f"the attention cannot be split over devices: {error.message}", where=where_in_model(output),
                remedy="do without cp",
            ) from error  # fmt: skip
        sizes = {name: int(size) for name, size in raised.sizes.items()}
        twin = self.layout.twin[output].meta["val"]
        operands = tuple(
            Operand(
                raised.tensor_of[node.name], ranks[node], tuple(sizes[rank.name] for rank in ranks[node]),
                node not in self.layout.whole,
            )
            for node in outside
        )  # fmt: skip
        return SplitAttention(
            split, operands, query, key, result, tuple(map(int, twin.shape)), twin.dtype, sizes, self.layout.parts
        )


@lru_cache(maxsize=256)
def _traversal(cascade: Cascade, query: sympy.Symbol, key: sympy.Symbol, result: str) -> SplitCascade:
    """Once for all equal layers."""
    wide = [einsum.output for einsum in cascade.einsums if {query, key} <= set(einsum.kept)]
    prepared = Cascade(tuple(prepare(cascade.einsums, wide)[0]))
    return split_cascade(without_unread(prepared, frozenset({result})), key)


def _ranks(raised: Raised, node: Node, output: Node) -> tuple[sympy.Symbol, ...]:
    """The ranks of an operand, the same wherever it is read."""
    name = raised.tensor_of[node.name]
    reads = {item.args for einsum in raised.cascade.einsums for item in einsum.reads if str(item.func) == name}
    if len(reads) != 1 or not all(index.is_Symbol for index in next(iter(reads))):
        _refuse(output, f"{node.name} is read at {len(reads)} places of each token, or at computed ones")
    return tuple(next(iter(reads)))


def _rank_at(raised: Raised, name: str, indices: Sequence[sympy.Symbol], dimension: int, output: Node) -> sympy.Symbol:
    """The rank that a dimension of a graph value is."""
    dims = raised.tensors[name].dims
    if dims[dimension] != 1:
        _refuse(output, f"the tokens of {name} are taken apart")
    return indices[sum(dims[:dimension])]


def _copies_of_less(node: Node) -> list[Node]:
    """The ops that make a value from a smaller one by repeating it (heads that share keys): what travels is then the
    smaller one."""
    chain: list[Node] = []
    best: list[Node] = []
    least = node.meta["val"].numel()
    while node.target in _VIEWS and len(node.users) == 1 and isinstance(node.args[0], Node):
        chain.append(node)
        node = node.args[0]
        if node.meta["val"].numel() < least:
            best, least = list(chain), node.meta["val"].numel()
    return best


def _caller(attention: SplitAttention, group: SequenceGroup | None, form: str, number: int) -> Callable[..., Any]:
    function = Ring if form == "ring" else Tree

    def call(*operands: torch.Tensor) -> torch.Tensor:
        assert group is not None, "a graph without a group of ranks is not run"
        found: torch.Tensor = function.apply(attention, group, *operands)  # type: ignore[no-untyped-call]
        return found

    call.__name__ = call.__qualname__ = f"attention_over_devices_{number}"
    call.attention = attention  # type: ignore[attr-defined]
    return call


def _refuse(node: Node, why: str) -> None:
    raise PipelineError(
        f"the attention cannot be split over devices: {why}", where=where_in_model(node), remedy="do without cp"
    )
