"""The shape of a transformer from its captured graph: repeated structure, products and their operands; no names.

A layer is what the graph calls most (or, where layers were not shared, the modules of one numbered container). In it
the products of two computed values are the attention; products with a parameter that the attention depends on make
queries, keys and values, the first one behind it leads back to the stream, the others are the feed-forward part.
Outside, the table that tokens are looked up in is the vocabulary's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...errors import OptionError
from ...ir.graph import Graph, Node, Ref, Symbol
from ..op_classes import ATTENTION_FORWARD, VIEWS, packet
from ..tensors import TensorTable
from .shape import TransformerShape

#: Ops that hand a value on unchanged but for layout or type.
_HANDS_ON = VIEWS | {"prims.convert_element_type", "aten._to_copy", "aten.clone", "aten.contiguous"}
#: What rotary embeddings are made of.
_TURNS = {"aten.cos", "aten.sin", "aten.polar"}
#: Product -> places of its two operands among the arguments.
_PRODUCTS = {
    "aten.mm": (0, 1), "aten.bmm": (0, 1), "aten.addmm": (1, 2), "aten.baddbmm": (1, 2), "aten.linear": (0, 1),
    "aten.matmul": (0, 1), "aten._grouped_mm": (0, 1),
}  # fmt: skip
_NUMBERED = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class _Layer:
    nodes: tuple[Node, ...]
    table: TensorTable
    #: Inputs that are parameters.
    parameters: frozenset[str]
    count: int


@dataclass(frozen=True)
class _Weighted:
    """A product with a parameter: (tokens, depth) @ (depth, columns), one for each of ``experts`` where there are."""

    name: str
    depth: int
    columns: int
    experts: int
    bias: bool


def shape_of_graph(graph: Graph, sizes: Mapping[str, int] | None = None) -> tuple[TransformerShape, int]:
    """The shape of a captured forward, and the samples of its inputs.

    Raises OptionError saying what is missing where the graph is no stack of equal layers with attention.
    """
    layer = _find_layer(graph, sizes or {})
    by_name = {node.name: node for node in layer.nodes}
    weighted = {each.name: each for node in layer.nodes if (each := _weighted(node, layer, by_name)) is not None}
    heads, head_size, sequence, samples, core, last = _attention(layer, weighted, by_name)
    before = _ancestors(core, by_name)
    projections = [each for name, each in weighted.items() if name in before]
    width = heads * head_size
    out = next((each for each in weighted.values() if each.name not in before and each.depth == width
                and last in _ancestors(each.name, by_name)), None)  # fmt: skip
    if not projections or out is None:
        raise _missing("the products around its attention")
    hidden = out.columns
    rest = [each for name, each in weighted.items() if name not in before and each is not out]
    routed = [each for each in rest if each.experts > 1]
    shared = [each for each in rest if each.experts == 1 and each.columns > 0]
    experts = max((each.experts for each in routed), default=0)
    dense, gated = _widths(shared, hidden, experts)
    wide, wide_gated = _widths(routed, hidden, 0)
    if not (dense or wide):
        raise _missing("its feed-forward part")
    kv = (sum(each.columns for each in projections) - width) // (2 * head_size)
    vocabulary, tied, positions = _tables(graph, hidden, sizes or {})
    return TransformerShape(
        layers=layer.count, hidden=hidden, heads=heads, kv_heads=max(1, kv), head_size=head_size,
        feed_forward=wide or dense, vocabulary=vocabulary, sequence=sequence, gated=wide_gated if wide else gated,
        tied=tied, biases=any(each.bias for each in weighted.values()), positions=positions, experts=experts,
        experts_per_token=_chosen(layer) if experts else 0, shared_feed_forward=dense if wide else 0,
        rotary=any(packet(node.op) in _TURNS for node in graph.nodes),
    ), samples  # fmt: skip


def _missing(what: str) -> OptionError:
    return OptionError(
        f"the captured model is no transformer that can be laid on a mesh: {what} was not found",
        remedy="meshes are priced for stacks of equal layers with attention",
    )


def _find_layer(graph: Graph, sizes: Mapping[str, int]) -> _Layer:
    calls = [node for node in graph.nodes if node.op == "call"]
    counts = Counter(_target(node) for node in calls)
    for name, _ in counts.most_common():
        nodes = graph.subgraphs[name].nodes
        if any(packet(node.op) in ATTENTION_FORWARD | {"aten.bmm", "aten.baddbmm"} for node in nodes):
            return _called_layer(graph, name, calls, sizes)
    groups: dict[tuple[str, int], list[Node]] = {}
    current: list[Node] = []
    for node in graph.nodes:
        if node.op == "input":
            continue
        if found := _NUMBERED.match(node.location.module):
            current = groups.setdefault((found[1], int(found[2])), [])
        elif node.location.module:
            current = []
        current.append(node)  # what a pass made without a location belongs where it stands
    containers = Counter(container for container, _ in groups)
    for container, count in containers.most_common():
        numbers = sorted(number for name, number in groups if name == container)
        nodes = tuple(groups[container, numbers[-1]])
        if any(packet(node.op) in ATTENTION_FORWARD | {"aten.bmm", "aten.baddbmm"} for node in nodes):
            inputs = tuple(node for node in graph.nodes if node.op == "input")
            return _Layer(inputs + nodes, TensorTable(graph, sizes), _parameters(graph), count)
    raise _missing("a layer with attention")


def _called_layer(graph: Graph, name: str, calls: Iterable[Node], sizes: Mapping[str, int]) -> _Layer:
    subgraph = graph.subgraphs[name]
    parameters = _parameters(graph)
    by_name = {node.name: node for node in graph.nodes}
    first = next(node for node in calls if _target(node) == name)
    inputs = [node for node in subgraph.nodes if node.op == "input"]
    given = {
        mine.name for mine, argument in zip(inputs, first.args[1:], strict=False)
        if isinstance(argument, Ref) and _source(argument.name, by_name) in parameters
    }  # fmt: skip
    alike = {_target(node) for node in calls if _products(graph.subgraphs[_target(node)]) == _products(subgraph)}
    count = sum(_target(node) in alike for node in calls)
    return _Layer(subgraph.nodes, TensorTable(subgraph, sizes), frozenset(given), count)


def _products(graph: Graph) -> int:
    return sum(packet(node.op) in _PRODUCTS or packet(node.op) in ATTENTION_FORWARD for node in graph.nodes)


def _target(node: Node) -> str:
    target = node.args[0]
    return target.text.removeprefix("@") if isinstance(target, Symbol) else ""


def _parameters(graph: Graph) -> frozenset[str]:
    return frozenset(node.name for node in graph.nodes if node.op == "input" and node.role == "parameter")


def _source(name: str, by_name: Mapping[str, Node]) -> str:
    """The value that this one is a view or a copy of."""
    node = by_name.get(name)
    while node is not None and packet(node.op) in _HANDS_ON:
        first = next(node.operands(), None)
        if first is None:
            break
        name, node = first, by_name.get(first)
    return name


def _weighted(node: Node, layer: _Layer, by_name: Mapping[str, Node]) -> _Weighted | None:
    """The product if one operand is a parameter; any op that reads a table of matrices multiplies by its experts."""
    base = packet(node.op)
    if base in _HANDS_ON or node.op == "input":
        return None
    places = _PRODUCTS.get(base, tuple(range(len(node.args))))
    for place in reversed(places):
        argument = node.args[place]
        if not isinstance(argument, Ref):
            continue
        source = _source(argument.name, by_name)
        if source not in layer.parameters:
            continue
        weight, outputs = layer.table.of(source)[0].shape, layer.table.of(node.name)
        experts = weight[0] if len(weight) == 3 else 1
        if not outputs or not outputs[0].shape or (base not in _PRODUCTS and experts == 1):
            continue
        columns = outputs[0].shape[-1]
        bias = base in ("aten.addmm", "aten.baddbmm") or (base == "aten.linear" and len(node.args) > 2)
        return _Weighted(node.name, math.prod(weight[-2:]) // columns, columns, experts, bias)
    return None


def _ancestors(name: str, by_name: Mapping[str, Node]) -> set[str]:
    """All values that a value depends on, itself not among them."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        node = by_name.get(waiting.pop())
        for operand in node.operands() if node is not None else ():
            if operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found


def _attention(
    layer: _Layer, weighted: Mapping[str, _Weighted], by_name: Mapping[str, Node]
) -> tuple[int, int, int, int, str, str]:
    """Heads, their size, tokens, samples, and the first and last value of the attention."""
    for node in layer.nodes:
        if packet(node.op) in ATTENTION_FORWARD and isinstance(node.args[0], Ref):
            query = layer.table.of(node.args[0].name)[0].shape
            return query[-3], query[-1], query[-2], math.prod(query[:-3]), node.name, node.name
    batched = ("aten.bmm", "aten.baddbmm", "aten.matmul")
    core = [node for node in layer.nodes if packet(node.op) in batched and node.name not in weighted]
    if len(core) < 2:
        raise _missing("attention")
    place = _PRODUCTS[packet(core[0].op)][0]
    argument = core[0].args[place]
    assert isinstance(argument, Ref)
    query = layer.table.of(argument.name)[0].shape
    batch, sequence, size = math.prod(query[:-2]), query[-2], query[-1]
    samples = max(1, _tokens(layer, weighted) // sequence)
    return batch // samples, size, sequence, samples, core[0].name, core[-1].name


def _tokens(layer: _Layer, weighted: Mapping[str, _Weighted]) -> int:
    """Rows of the layer's products with dense weights."""
    return max(
        (layer.table.of(name)[0].elements // each.columns for name, each in weighted.items() if each.experts == 1),
        default=0,
    )


def _widths(products: Iterable[_Weighted], hidden: int, experts: int) -> tuple[int, bool]:
    """Width of a feed-forward part made of these products, and whether it is gated; a router's product is left out."""
    down = [each for each in products if each.columns == hidden and each.depth != hidden]
    up = [each for each in products if each.depth == hidden and each.columns != experts]
    if not down or not up:
        same = [each for each in products if each.depth == each.columns == hidden]  # as wide as the stream
        return (hidden, len(same) > 2) if len(same) >= 2 else (0, False)
    width = down[0].depth
    return width, sum(each.columns for each in up) >= 2 * width


def _chosen(layer: _Layer) -> int:
    """Experts of a token: what the router keeps of its sorted scores."""
    for node in layer.nodes:
        if packet(node.op) == "aten.topk" and len(node.args) > 1 and isinstance(node.args[1], int):
            return node.args[1]
    return 1


def _tables(graph: Graph, hidden: int, sizes: Mapping[str, int]) -> tuple[int, bool, int]:
    """Entries of the vocabulary, whether input and output share its table, and learned positions."""
    table = TensorTable(graph, sizes)
    by_name = {node.name: node for node in graph.nodes}
    looked = []
    for node in graph.nodes:
        if packet(node.op) == "aten.embedding" and isinstance(node.args[0], Ref):
            source = _source(node.args[0].name, by_name)
            looked.append((table.of(source)[0].shape[0], source))
    if not looked:
        raise _missing("the table of its vocabulary")
    vocabulary, source = max(looked)
    used = {
        _source(argument.name, by_name)
        for node in graph.nodes if packet(node.op) in _PRODUCTS
        for argument in node.args if isinstance(argument, Ref)
    }  # fmt: skip
    positions = sum(entries for entries, other in looked if other != source)
    return vocabulary, source in used, positions
