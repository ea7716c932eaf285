"""One spelling for each operation, and ops that do nothing taken out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.graph import Argument, Graph, Node, Ref
from ..ir.types import TensorType
from .effects import Storages
from .rewriting import rebuild, rename_node, with_subgraphs

#: ATen op -> position of the argument that is a dimension, or a list of them.
DIMENSION_ARGUMENT: dict[str, int] = {
    "aten.sum.dim_IntList": 1,
    "aten.mean.dim": 1,
    "aten.amax.default": 1,
    "aten.amin.default": 1,
    "aten.var.correction": 1,
    "aten.var_mean.correction": 1,
    "aten.logsumexp.default": 1,
    "aten._softmax.default": 1,
    "aten._log_softmax.default": 1,
    "aten.permute.default": 1,
    "aten.select.int": 1,
    "aten.slice.Tensor": 1,
    "aten.split.Tensor": 2,
    "aten.split_with_sizes.default": 2,
    "aten.cumsum.default": 1,
    "aten.argmax.default": 1,
    "aten.gather.default": 1,
    "aten.index_select.default": 1,
    "aten.squeeze.dim": 1,
    "aten.squeeze.dims": 1,
}

#: Ops that return their first argument unchanged when the type stays the same.
SAME_TYPE_IDENTITY = frozenset(
    """aten.view.default aten._unsafe_view.default aten.reshape.default aten.expand.default aten.alias.default
    aten._to_copy.default aten.to.dtype prims.convert_element_type.default aten.clone.default aten.positive.default
    aten.contiguous.default aten.lift_fresh_copy.default prims.view_of.default aten.squeeze.dims""".split()
)

#: Ops of a tensor and a number that change no bit of the tensor for this number (adding 0 does: it turns -0 into 0).
NEUTRAL_NUMBER: dict[str, float] = {
    "aten.mul.Tensor": 1,
    "aten.mul.Scalar": 1,
    "aten.div.Tensor": 1,
    "aten.div.Scalar": 1,
    "aten.pow.Tensor_Scalar": 1,
    "aten.sub.Tensor": 0,
    "aten.sub.Scalar": 0,
}


@dataclass(frozen=True)
class Canonicalize:
    """Write equal operations in one way and drop those that change nothing.

    Transposes become ``permute``; dimensions count from the front; ``-1`` in a view gives way to the size; a chain of
    views or permutes becomes one; views, casts, copies and scalings that change neither type nor bits are skipped. A
    value that the graph returns, or whose storage is written, is never replaced by another.

    rewrite::

        %a: f32[3,2] = aten.t.default(%x)                        ->
        %b: f32[2,3] = aten.transpose.int(%a, -1, -2)
        %c: f32[6] = aten.view.default(%b, (-1,))                %c: f32[6] = aten.view.default(%x, (6,))
    """

    name: ClassVar[str] = "canonicalize"

    def apply(self, graph: Graph) -> Graph:
        graph = with_subgraphs(graph, self.apply)
        storages = Storages(graph)
        returned = set(graph.output_names())
        table: dict[str, Node] = {}
        replaced: dict[str, Argument] = {}
        kept: list[Node] = []
        for original in graph.nodes:
            node = rename_node(original, replaced)
            if storages.root(node.name) not in storages.written:
                for rule in RULES:
                    node = rule(node, table)
            table[node.name] = node
            source = _unchanged_source(node, table)
            if source is not None and node.name not in returned and _may_share(node.name, source, storages):
                replaced[node.name] = Ref(source)
            else:
                kept.append(node)
        same = len(kept) == len(graph.nodes) and all(a is b for a, b in zip(kept, graph.nodes, strict=True))
        return graph if same else rebuild(graph, kept, replaced)


def _may_share(name: str, source: str, storages: Storages) -> bool:
    """Whether ``source`` may stand for ``name``.

    It may when neither's storage is written, and no fresh storage that leaves the graph (through a view of it) would be
    exchanged for another.
    """
    one, other = storages.root(name), storages.root(source)
    if one in storages.written or other in storages.written:
        return False
    return one == other or one not in storages.escaping


def _unchanged_source(node: Node, table: dict[str, Node]) -> str | None:
    """The operand that the node returns bit by bit, if there is one."""
    if not node.args or not isinstance(node.args[0], Ref) or not isinstance(node.type, TensorType):
        return None
    source = node.args[0].name
    if source not in table or table[source].type != node.type:
        return None
    if node.op in SAME_TYPE_IDENTITY:
        return source
    if node.op == "aten.permute.default" and node.args[1] == tuple(range(len(node.type.shape))):
        return source
    if node.op in NEUTRAL_NUMBER and len(node.args) == 2 and not node.kwargs:
        number = node.args[1]
        if isinstance(number, int | float) and not isinstance(number, bool) and number == NEUTRAL_NUMBER[node.op]:
            return source
    return None


def _transpose_to_permute(node: Node, table: dict[str, Node]) -> Node:
    if node.op not in ("aten.t.default", "aten.transpose.int", "aten.numpy_T.default"):
        return node
    if not isinstance(node.type, TensorType) or node.kwargs:
        return node
    order = list(range(len(node.type.shape)))
    if node.op == "aten.transpose.int":
        if not order or len(node.args) != 3:
            return node
        first, second = node.args[1], node.args[2]
        if not (isinstance(first, int) and isinstance(second, int)):
            return node
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    return replace(node, op="aten.permute.default", args=(node.args[0], tuple(order)))


def _dimensions_from_front(node: Node, table: dict[str, Node]) -> Node:
    position = DIMENSION_ARGUMENT.get(node.op)
    if position is None or position >= len(node.args) or not isinstance(node.args[0], Ref):
        return node
    source = table.get(node.args[0].name)
    if source is None or not isinstance(source.type, TensorType) or not source.type.shape:
        return node
    rank = len(source.type.shape)

    def front(value: Argument) -> Argument:
        if isinstance(value, tuple):
            return tuple(front(item) for item in value)
        return value + rank if isinstance(value, int) and value < 0 else value

    return _with_argument(node, position, front(node.args[position]))


def _sizes_of_view(node: Node, table: dict[str, Node]) -> Node:
    if node.op not in ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.expand.default"):
        return node
    if len(node.args) != 2 or not isinstance(node.type, TensorType):
        return node
    sizes = node.args[1]
    if not (isinstance(sizes, tuple) and len(sizes) == len(node.type.shape)):
        return node
    new = tuple(
        size if known == -1 and not isinstance(size, Ref) else known
        for known, size in zip(sizes, node.type.shape, strict=True)
    )
    return _with_argument(node, 1, new)


def _view_of_view(node: Node, table: dict[str, Node]) -> Node:
    if node.op != "aten.view.default" or not isinstance(node.args[0], Ref):
        return node
    source = table.get(node.args[0].name)
    if source is None or source.op != "aten.view.default":
        return node
    return _with_argument(node, 0, source.args[0])


def _permute_of_permute(node: Node, table: dict[str, Node]) -> Node:
    if node.op != "aten.permute.default" or not isinstance(node.args[0], Ref):
        return node
    source = table.get(node.args[0].name)
    if source is None or source.op != "aten.permute.default":
        return node
    inner, outer = source.args[1], node.args[1]
    if not (isinstance(inner, tuple) and isinstance(outer, tuple) and len(inner) == len(outer)):
        return node
    order = tuple(inner[index] for index in outer if isinstance(index, int))
    return replace(node, args=(source.args[0], order)) if len(order) == len(outer) else node


def _with_argument(node: Node, position: int, value: Argument) -> Node:
    if node.args[position] == value:
        return node
    return replace(node, args=(*node.args[:position], value, *node.args[position + 1 :]))


Rule = Callable[[Node, dict[str, Node]], Node]

#: Applied to each node in this order; each returns the node itself when it has nothing to say.
RULES: tuple[Rule, ...] = (
    _transpose_to_permute,
    _dimensions_from_front,
    _sizes_of_view,
    _view_of_view,
    _permute_of_permute,
)
