"""Concrete sizes of a graph's values: shapes as integers under a binding of the shape symbols."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import sympy

from ..errors import ShapeError
from ..ir.fused_cascade import FusedCascade
from ..ir.graph import CASCADE_OP, Graph, Node, Ref, Symbol
from ..ir.types import DTYPES, Size, TensorType, TupleType, Type

Bindings = Mapping[str, int]


@dataclass(frozen=True)
class Tensor:
    """A tensor with known sizes. ``bytes`` is what reading every distinct element moves; ``storage`` the bytes of the
    memory it spans."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    storage: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def evaluate(size: Size, bindings: Bindings, where: str = "") -> int:
    """The integer value of a size; raises ShapeError naming the symbols that have no binding."""
    if isinstance(size, int):
        return size
    value = size.subs({symbol: bindings[symbol.name] for symbol in size.free_symbols if symbol.name in bindings})
    if isinstance(value, sympy.Expr) and value.is_Integer:
        return int(value)
    missing = sorted(str(symbol) for symbol in value.free_symbols)
    raise ShapeError(
        f"size {size} is not a number: no value for {', '.join(missing) or value}",
        where=where,
        remedy="give a value to each shape symbol",
    )


def tensors(type: Type | None, bindings: Bindings, where: str = "") -> Iterator[Tensor]:
    """The tensors of a type, depth first."""
    if isinstance(type, TensorType):
        yield concrete(type, bindings, where)
    elif isinstance(type, TupleType):
        for item in type.items:
            yield from tensors(item, bindings, where)


def concrete(type: TensorType, bindings: Bindings, where: str = "") -> Tensor:
    """The tensor type under a binding of its symbols."""
    item = DTYPES[type.dtype][1]
    shape = tuple(evaluate(size, bindings, where) for size in type.shape)
    if type.stride is None:
        storage = math.prod(shape) * item
        return Tensor(type.dtype, shape, storage, storage)
    stride = tuple(evaluate(size, bindings, where) for size in type.stride)
    if 0 in shape:
        return Tensor(type.dtype, shape, 0, 0)
    distinct = math.prod(size for size, step in zip(shape, stride, strict=True) if step != 0)
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return Tensor(type.dtype, shape, min(distinct, extent) * item, extent * item)


def _spans(type: TupleType) -> list[slice]:
    spans, begin = [], 0
    for item in type.items:
        end = begin + _count(item)
        spans.append(slice(begin, end))
        begin = end
    return spans


def _count(type: Type) -> int:
    """How many tensors a type holds."""
    return sum(map(_count, type.items)) if isinstance(type, TupleType) else int(isinstance(type, TensorType))


class TensorTable:
    """Tensors of every value of one graph, evaluated once."""

    def __init__(self, graph: Graph, bindings: Bindings | None = None) -> None:
        self.graph = graph
        self.bindings: Bindings = bindings or {}
        self._nodes = graph.by_name()
        self._tensors: dict[str, tuple[Tensor, ...]] = {}
        self._spans: dict[str, list[slice] | None] = {}

    def cascade(self, node: Node) -> FusedCascade | None:
        """The fused cascade that a node runs."""
        target = node.args[0] if node.op == CASCADE_OP and node.args else None
        return self.graph.cascades.get(target.text.removeprefix("@")) if isinstance(target, Symbol) else None

    def node(self, name: str) -> Node:
        return self._nodes[name]

    def of(self, name: str) -> tuple[Tensor, ...]:
        """All tensors of a value; an empty tuple for numbers and None."""
        found = self._tensors.get(name)
        if found is None:
            found = tuple(tensors(self._nodes[name].type, self.bindings, f"%{name} of graph {self.graph.name!r}"))
            self._tensors[name] = found
        return found

    def spans(self, name: str) -> list[slice] | None:
        """Which of a tuple value's tensors each of its items holds; None for a value that is no tuple."""
        if name not in self._spans:
            type_ = self._nodes[name].type
            self._spans[name] = _spans(type_) if isinstance(type_, TupleType) else None
        return self._spans[name]

    def operand(self, argument: object) -> Tensor | None:
        """The tensor that an argument refers to, None for anything else."""
        if isinstance(argument, Ref):
            found = self.of(argument.name)
            if len(found) == 1:
                return found[0]
        return None

    def read(self, node: Node) -> list[Tensor]:
        """Distinct tensors that a node reads."""
        return [tensor for name in dict.fromkeys(node.operands()) for tensor in self.of(name)]


def called(node: Node, graph: Graph) -> Graph | None:
    """The subgraph of a ``call`` node. Subgraphs may share their parent's table of subgraphs."""
    target = node.args[0]
    if not isinstance(target, Symbol):
        return None
    found = graph.subgraphs.get(target.text.removeprefix("@"))
    if found is not None and not found.subgraphs and graph.subgraphs:
        found = replace(found, subgraphs=graph.subgraphs)
    return found
