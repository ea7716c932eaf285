"""Values that are known before the graph runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..ir.graph import Argument, Graph, Node, Ref, Symbol
from ..ir.types import DTYPES, ScalarType, TensorType, contiguous_stride
from .effects import Storages, has_effect
from .rewriting import rebuild, rename_node, with_subgraphs

Number = int | float | bool

#: Tensors of one number: op -> position of that number, or the number itself.
FILLED: Mapping[str, int | float] = {
    "aten.full.default": 1,
    "aten.full_like.default": 1,
    "aten.scalar_tensor.default": 0,
}
ZEROS = frozenset({"aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default"})
ONES = frozenset({"aten.ones.default", "aten.ones_like.default", "aten.new_ones.default"})

#: Ops that rearrange or cast: of a tensor filled with one number they make a tensor filled with it.
REARRANGING = frozenset(
    """aten.view.default aten.reshape.default aten._unsafe_view.default aten.expand.default aten.permute.default
    aten.transpose.int aten.t.default aten.slice.Tensor aten.select.int aten.unsqueeze.default aten.squeeze.default
    aten.squeeze.dim aten.squeeze.dims aten.clone.default aten.alias.default aten.detach.default aten.contiguous.default
    aten._to_copy.default prims.convert_element_type.default prims.broadcast_in_dim.default""".split()
)

#: Pointwise ops evaluated here. Each is exactly rounded by IEEE 754, so numpy and torch give the same bits.
POINTWISE: Mapping[str, Callable[..., npt.NDArray[np.generic] | np.generic]] = {
    "aten.add.Tensor": np.add,
    "aten.add.Scalar": np.add,
    "aten.sub.Tensor": np.subtract,
    "aten.sub.Scalar": np.subtract,
    "aten.mul.Tensor": np.multiply,
    "aten.mul.Scalar": np.multiply,
    "aten.neg.default": np.negative,
    "aten.abs.default": np.abs,
}

_NUMPY: Mapping[str, type[np.generic]] = {"f64": np.float64, "f32": np.float32, "i64": np.int64, "i32": np.int32}


@dataclass(frozen=True)
class ConstantFolding:
    """Compute before the run what does not depend on any input.

    Sizes that are plain numbers replace the ops that ask for them. A tensor filled with one number stays one through
    views, casts and exactly rounded arithmetic (f32, f64, i32, i64): it becomes ``aten.full``. Storages that are
    written or leave the graph are left alone.

    rewrite::

        %n: int(8) = aten.sym_size.int(%x, 0)              ->
        %a: f32[8] = aten.full.default((8,), 2.0)
        %b: f32[8] = aten.mul.Tensor(%a, 0.5)                 %b: f32[8] = aten.full.default((8,), 1.0, ...)
        %c: f32[8] = aten.add.Tensor(%x, %b)                  %c: f32[8] = aten.add.Tensor(%x, %b)
    """

    name: ClassVar[str] = "constant-folding"

    def apply(self, graph: Graph) -> Graph:
        graph = with_subgraphs(graph, self.apply)
        storages = Storages(graph)
        returned = set(graph.output_names())
        fills: dict[str, Number] = {}
        replaced: dict[str, Argument] = {}
        kept: list[Node] = []
        table = graph.by_name()
        for original in graph.nodes:
            node = rename_node(original, replaced)
            number = _known_number(node, graph)
            if number is not None and node.name not in returned:
                replaced[node.name] = number
                continue
            root = storages.root(node.name)
            value = _fill_value(node, fills, table) if root not in storages.written else None
            if value is not None:
                fills[node.name] = value
                if node.op not in FILLED and root not in storages.escaping:
                    node = _full(node, value)
            kept.append(node)
        same = len(kept) == len(graph.nodes) and all(a is b for a, b in zip(kept, graph.nodes, strict=True))
        return graph if same else rebuild(_without_views_of(graph, kept), kept, replaced)


def _without_views_of(graph: Graph, kept: list[Node]) -> Graph:
    """The graph without alias facts of values that have become tensors of their own."""
    fresh = {node.name for node in kept if node.op == "aten.full.default"}
    aliases = tuple(alias for alias in graph.aliases if alias.name not in fresh)
    return graph if len(aliases) == len(graph.aliases) else replace(graph, aliases=aliases)


def _known_number(node: Node, graph: Graph) -> Number | None:
    """The value of an op that yields a Python number which is the same in every run."""
    if not isinstance(node.type, ScalarType) or node.op == "input" or has_effect(node, graph):
        return None
    value = node.type.value
    if isinstance(value, bool | int | float):
        if node.type.kind == "bool":
            return bool(value)
        return float(value) if node.type.kind == "float" else int(value)
    return None


def _fill_value(node: Node, fills: Mapping[str, Number], table: Mapping[str, Node]) -> Number | None:
    """The one number in every element of the node's value, in the node's own dtype."""
    if not isinstance(node.type, TensorType):
        return None
    value: object = None
    if node.op in FILLED:
        position = int(FILLED[node.op])
        value = node.args[position] if position < len(node.args) else None
    elif node.op in ZEROS or node.op in ONES:
        value = int(node.op in ONES)
    elif node.op in REARRANGING and node.args and isinstance(node.args[0], Ref):
        value = fills.get(node.args[0].name)
        source = table[node.args[0].name].type
        if not isinstance(source, TensorType) or not _cast_keeps(value, source.dtype, node.type.dtype):
            return None
    elif node.op in POINTWISE and not node.kwargs:
        return _evaluate(node, fills, table)
    return _in_dtype(value, node.type.dtype)


def _evaluate(node: Node, fills: Mapping[str, Number], table: Mapping[str, Node]) -> Number | None:
    """A pointwise op of filled tensors and numbers, when every tensor has the result's dtype."""
    assert isinstance(node.type, TensorType)
    kind = _NUMPY.get(node.type.dtype)
    operands: list[np.generic] = []
    for argument in node.args:
        value: object = argument
        if isinstance(argument, Ref):
            source = table[argument.name].type
            if not isinstance(source, TensorType) or source.dtype != node.type.dtype:
                return None
            value = fills.get(argument.name)
        if kind is None or isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if _in_dtype(value, node.type.dtype) != value:
            return None
        operands.append(kind(value))
    with np.errstate(all="ignore"):
        result = POINTWISE[node.op](*operands)
    return result.item()  # type: ignore[no-any-return]


def _cast_keeps(value: object, source: str, target: str) -> bool:
    """Whether a cast between the dtypes leaves this number as it is, in numpy's arithmetic."""
    return source == target or (isinstance(value, int | float) and _in_dtype(value, target) == value)


def _in_dtype(value: object, dtype: str) -> Number | None:
    """The number as an element of ``dtype`` holds it; None where that is not exactly known."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, bool) and dtype == "b1" else None
    if dtype == "b1":
        return bool(value)
    kind = _NUMPY.get(dtype)
    if kind is not None:
        if issubclass(kind, np.integer):
            limits = np.iinfo(kind)
            return int(value) if float(value).is_integer() and limits.min <= value <= limits.max else None
        with np.errstate(over="ignore"):
            return float(kind(value).item())
    small = isinstance(value, int) or float(value).is_integer()
    return float(value) if dtype in ("bf16", "f16") and small and abs(value) <= 256 else None


def _full(node: Node, value: Number) -> Node:
    """The same value as a fresh ``aten.full``; only for row-major results, which is what ``full`` makes."""
    type_ = node.type
    assert isinstance(type_, TensorType)
    if type_.stride is not None and type_.stride != contiguous_stride(type_.shape):
        return node
    if any(not isinstance(size, int) for size in type_.shape):
        return node
    kwargs: tuple[tuple[str, Argument], ...] = (
        ("dtype", Symbol(f"torch.{DTYPES[type_.dtype][0]}")),
        ("layout", Symbol("torch.strided")),
        ("device", Symbol(f"device({type_.device})")),
        ("pin_memory", False),
    )
    args: tuple[Argument, ...] = (type_.shape, value)
    origin = node.origin or f"{node.op.split('.')[1]} of a constant"
    return replace(node, op="aten.full.default", args=args, kwargs=kwargs, origin=origin)
