"""A step's graph cut into stages: what each computes, receives and sends.

Nodes that depend on no parameter (masks, positions, rotary tables) are computed by every stage that reads them; so
between stages goes what the layers pass on. A value that skips stages is handed through them. Cuts balance the stages'
work, as far as that is worth what is handed over.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ...errors import PipelineError
from ...passes.pipeline_parallel.schedule import Schedule
from .step_graph import InputHead, LossHead, OutputHead, StepGraph, aten, free_nodes

#: Work that takes about as long as to hand a byte to another device, in FLOP: from some tens (CPU cores, through
#: sockets) to some thousands (GPUs, over a network).
_FLOP_PER_BYTE = 100.0


@dataclass(frozen=True)
class Value:
    """What goes from a stage to the next. ``differentiable``: a gradient comes back."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool


@dataclass(frozen=True)
class Argument:
    """What a stage's module is called with: ``kind`` is parameter or buffer (``name``: its path), constant or input
    (its placeholder), received (a value's name), embedded (the looked up input)."""

    kind: str
    name: str


@dataclass(frozen=True)
class Stage:
    """``module(*arguments)`` gives what is sent, in order; of the last stage the loss, or the rows of the hidden state
    that the sharded output layer takes. ``flop``: rough count of a forward."""

    index: int
    module: GraphModule
    arguments: tuple[Argument, ...]
    receives: tuple[Value, ...]
    sends: tuple[Value, ...]
    flop: float


@dataclass(frozen=True)
class Stages:
    """All stages of a step. ``targets(inputs)`` gives the loss's targets, where the loss is a cross-entropy;
    ``indices(inputs)`` those of the sharded input embedding. ``rows``: shape of what the output layer takes."""

    stages: tuple[Stage, ...]
    loss: LossHead | None
    output: OutputHead | None
    input: InputHead | None
    targets: Callable[..., torch.Tensor] | None
    indices: Callable[..., torch.Tensor] | None
    rows: Value
    embedded: Value | None
    #: Placeholders of what the step is called with, in order; constants by placeholder.
    input_names: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    #: Paths of the sharded matrices in the model.
    output_path: str | None
    input_path: str | None


def cut(graph: StepGraph, count: int, output: OutputHead | None = None, embedding: InputHead | None = None) -> Stages:
    """Cut into ``count`` stages; ``output`` and ``embedding`` are left out where they are sharded. A cross-entropy's
    mean becomes a sum, since it is taken over all microbatches.

    Raises PipelineError when the graph has fewer places to cut.
    """
    from .step_graph import loss_head

    loss = loss_head(graph)
    free = free_nodes(graph)
    work = [node for node in graph.nodes if node.op == "call_function" and node not in free]
    result = graph.result
    if output is not None:
        left_out = {output.linear, output.loss.node, *output.moved}
        work = [node for node in work if node not in left_out]
        result = output.hidden
    if embedding is not None:
        work = [node for node in work if node is not embedding.node]
    bounds = _bounds(work, result, count, embedding.node if embedding else None)
    stages = tuple(_stage(graph, index, work, bounds, result, free, embedding, output, loss) for index in range(count))
    rows = _rows(output, result)
    targets = _function(graph, loss.targets) if loss is not None else None
    indices = _function(graph, embedding.indices) if embedding is not None else None
    embedded = _value(embedding.node) if embedding is not None else None
    return Stages(
        stages, loss, output, embedding, targets, indices, rows, embedded, graph.inputs, graph.constants,
        graph.parameters[output.weight] if output is not None else None,
        graph.parameters[embedding.weight] if embedding is not None else None,
    )  # fmt: skip


def digest(schedule: Schedule, stages: Stages) -> bytes:
    """32 bytes that differ where ranks would not agree on what to run or to send."""
    parts = [(stage.arguments, stage.receives, stage.sends) for stage in stages.stages]
    return hashlib.sha256(repr((schedule.placement, schedule.orders, schedule.vocabulary, parts)).encode()).digest()


def _bounds(work: list[Node], result: Node, count: int, outside: Node | None) -> list[int]:
    """Begin of each stage in the list of nodes, and its end."""
    place = {node: index for index, node in enumerate(work)}
    crossing = [0.0] * (len(work) + 1)
    for node in [*work, *([outside] if outside is not None else [])]:
        last = max((place[user] for user in node.users if user in place), default=-1)
        if node is result:
            last = max(last, len(work) - 1)
        size = _bytes(node)
        for index in range(place.get(node, -1) + 1, last + 1):
            crossing[index] += size
    flop = [0.0]
    for node in work:
        flop.append(flop[-1] + node_flop(node))
    if len(work) < count:
        raise PipelineError(f"the step has {len(work)} ops for {count} stages", remedy="take fewer stages")
    share = flop[-1] / count
    best: list[int] | None = None
    least = float("inf")
    for most in sorted({crossing[index] for index in range(1, len(work))}):
        if share + _FLOP_PER_BYTE * most >= least:
            break
        places = [index for index in range(1, len(work)) if crossing[index] <= most]
        if len(places) < count - 1:
            continue
        found, fullest = _balance(flop, places, count)
        if fullest + _FLOP_PER_BYTE * most < least:
            best, least = found, fullest + _FLOP_PER_BYTE * most
    if best is None:
        raise PipelineError(f"the step cannot be cut into {count} stages", remedy="take fewer stages")
    return best


def _balance(flop: list[float], places: list[int], count: int) -> tuple[list[int], float]:
    """Cuts at some of the places so that the fullest stage has as little as possible."""
    low, high = flop[-1] / count, flop[-1]

    def cuts(limit: float) -> list[int] | None:
        found = [0]
        for stage in range(count - 1):
            left = count - 2 - stage
            # The last place within the limit that leaves one for each stage behind.
            index = bisect.bisect_right(places, found[-1])
            end = index
            while end < len(places) - left and flop[places[end]] - flop[found[-1]] <= limit:
                end += 1
            if end == index:
                return None
            found.append(places[end - 1])
        found.append(len(flop) - 1)
        return found if flop[-1] - flop[found[-2]] <= limit else None

    best = cuts(high)
    assert best is not None
    for _ in range(40):
        middle = (low + high) / 2
        found = cuts(middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best, _fullest(flop, best)


def _fullest(flop: list[float], bounds: list[int]) -> float:
    return max(flop[b] - flop[a] for a, b in itertools.pairwise(bounds))


def _stage(
    graph: StepGraph,
    index: int,
    work: list[Node],
    bounds: list[int],
    result: Node,
    free: set[Node],
    embedding: InputHead | None,
    output: OutputHead | None,
    loss: LossHead | None,
) -> Stage:
    begin, end = bounds[index], bounds[index + 1]
    place = {node: at for at, node in enumerate(work)}
    if embedding is not None:
        place[embedding.node] = -1
    last_stage = end == len(work)

    def crosses(node: Node, at: int) -> bool:
        """Whether the value is made before the at-th node and read from there on."""
        if place[node] >= at or (at == 0 and place[node] < 0):
            return False
        return node is result or any(place.get(user, -1) >= at for user in node.users)

    received = [node for node in place if crosses(node, begin)] if begin else []
    sent = [] if last_stage else [node for node in place if crosses(node, end)]
    builder = _Builder(graph, free, {node: ("received", node.name) for node in received})
    if embedding is not None and index == 0:
        builder.given[embedding.node] = ("embedded", embedding.node.name)
    for node in work[begin:end]:
        arguments = node.args
        if loss is not None and node is loss.node:
            arguments = (loss.rows, loss.targets, None, 2, loss.ignore_index, loss.label_smoothing)
        builder.copy(node, arguments)
    if last_stage:
        final = builder.value(result)
        if output is not None:
            final = _move_rows(builder, output, final)
        builder.graph.output((final,))
    else:
        builder.graph.output(tuple(builder.value(node) for node in sent))
    module = GraphModule(graph.module, builder.graph, f"Stage{index}")
    flop = sum(map(node_flop, work[begin:end]))
    return Stage(index, module, tuple(builder.arguments), tuple(map(_value, received)), tuple(map(_value, sent)), flop)


class _Builder:
    """Copies nodes of a graph into one of its own, with what they read."""

    def __init__(self, graph: StepGraph, free: set[Node], given: Mapping[Node, tuple[str, str]]) -> None:
        self.source, self.free = graph, free
        self.given = dict(given)
        self.graph = Graph()
        self.copies: dict[Node, Node] = {}
        self.arguments: list[Argument] = []

    def value(self, node: Node) -> Node:
        if node in self.copies:
            return self.copies[node]
        if node in self.given:
            return self._placeholder(node, *self.given[node])
        if node.op == "placeholder":
            name = node.name
            for kind, table in (("parameter", self.source.parameters), ("buffer", self.source.buffers)):
                if name in table:
                    return self._placeholder(node, kind, table[name])
            return self._placeholder(node, "constant" if name in self.source.constants else "input", name)
        if node in self.free:
            return self.copy(node, node.args)
        raise PipelineError(f"{node.name} is read by a stage that does not get it", remedy="this is a fault of effcc")

    def copy(self, node: Node, arguments: Any) -> Node:
        mapped = torch.fx.map_arg(arguments, self.value)
        keywords = torch.fx.map_arg(node.kwargs, self.value)
        self.copies[node] = self.graph.create_node(node.op, node.target, mapped, keywords, name=node.name)
        self.copies[node].meta = dict(node.meta)
        return self.copies[node]

    def _placeholder(self, node: Node, kind: str, name: str) -> Node:
        first = next((each for each in self.graph.nodes if each.op != "placeholder"), None)
        with self.graph.inserting_before(first) if first is not None else contextlib.nullcontext():
            self.copies[node] = self.graph.placeholder(node.name)
        self.copies[node].meta = dict(node.meta)
        self.arguments.append(Argument(kind, name))
        return self.copies[node]


def _move_rows(builder: _Builder, output: OutputHead, hidden: Node) -> Node:
    """The reshapes and slices between the logits and the loss, on the hidden state: [tokens, d]."""
    width = int(output.hidden.meta["val"].shape[-1])
    for node in output.moved:
        arguments = [
            [*each[:-1], width] if isinstance(each, list | tuple) and each and each[-1] == output.size else each
            for each in node.args[1:]
        ]
        hidden = builder.graph.call_function(node.target, (hidden, *arguments), dict(node.kwargs))  # type: ignore[arg-type]
    return hidden


def _rows(output: OutputHead | None, result: Node) -> Value:
    if output is None:
        return _value(result)
    shape = output.loss.rows.meta["val"].shape
    width = output.hidden.meta["val"].shape[-1]
    return Value("rows", (*map(int, shape[:-1]), int(width)), output.hidden.meta["val"].dtype, True)


def _function(graph: StepGraph, node: Node) -> Callable[..., torch.Tensor]:
    """A value that depends on the inputs alone, as a function of them. Raises PipelineError for one that does not."""
    free = free_nodes(graph)
    if node not in free:
        raise PipelineError(f"{node.name} depends on parameters", remedy="give targets and indices as inputs")
    builder = _Builder(graph, free, {})
    for name in graph.inputs:  # all of them, in order
        builder.value(next(each for each in graph.nodes if each.name == name))
    builder.graph.output(builder.value(node))
    if any(argument.kind != "input" for argument in builder.arguments):
        raise PipelineError(f"{node.name} depends on buffers", remedy="give targets and indices as inputs")
    return GraphModule(graph.module, builder.graph)


def _value(node: Node) -> Value:
    value = node.meta["val"]
    return Value(node.name, tuple(map(int, value.shape)), value.dtype, bool(value.dtype.is_floating_point))


def _bytes(node: Node) -> float:
    value = node.meta.get("val")
    return float(value.numel() * value.element_size()) if isinstance(value, torch.Tensor) else 1e18


def node_flop(node: Node) -> float:
    """Rough work of an op: products by their size, others by the elements they make."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0.0
    shapes = [each.meta["val"].shape for each in node.all_input_nodes if isinstance(each.meta.get("val"), torch.Tensor)]
    if node.target in (aten.linear.default, aten.mm.default, aten.matmul.default, aten.bmm.default):
        return float(2.0 * value.numel() * shapes[0][-1])
    if node.target is aten.addmm.default:
        return float(2.0 * value.numel() * shapes[1][-1])
    if node.target is aten.scaled_dot_product_attention.default:
        return float(4.0 * value.numel() * shapes[1][-2])
    return float(4.0 * value.numel())
