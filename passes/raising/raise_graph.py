"""A graph of ATen ops as one cascade of Einsums, and which graph value each tensor is.

Ops without a handler, with an argument that is only known at run time, with a random or written operand, or of which
nothing can be proven stay as they are: their results are *leaves* of the cascade, like the graph's inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...ir.cascade import Cascade, Einsum
from ...ir.graph import Graph, Node, Ref
from ...ir.types import ScalarType, TensorType, TupleType
from ..effects import Storages, has_effect, is_view
from .calls import Call, same_shape
from .emit import Tensor, Unwritten, base, emit
from .handlers import handler_of
from .program import INTEGERS, PRECISION, NotRaised, Program
from .sizes import equal
from .steps import Leaf, Regroup, Value

#: Times that an op without affine form is made a leaf and the rest is written again.
_MAX_ROUNDS = 50


@dataclass(frozen=True)
class Raised:
    """``cascade`` computes, from its inputs (leaves), every graph value that something else needs.

    ``tensors``: name -> what is known of it. ``sizes``: rank name -> size. ``kept``: op that stays -> why.
    ``lines`` numbers the graph's nodes: an Einsum's ``line`` is the position of its node in ``graph.nodes``.
    """

    graph: Graph
    cascade: Cascade
    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, Any]
    kept: Mapping[str, str]
    #: Graph value -> (tensor that it is or is a view of, or "" if it is written into its readers).
    tensor_of: Mapping[str, str]
    #: Tensors that the graph's outputs and the ops that stay need.
    needed: frozenset[str]
    #: The Einsums with ranks of their own each, and the sizes of those: what groups are named from.
    raw: tuple[Einsum, ...]
    raw_sizes: Mapping[str, Any]
    #: Copy of a tensor that several Einsums read -> how many copies there are (``own_copies``).
    shared: Mapping[str, int] = field(default_factory=dict)


def raise_graph(graph: Graph, keep: Collection[str] = ()) -> Raised:
    """Raise ``graph`` itself; its subgraphs are left for calls of their own.

    ``keep`` names values that shall be tensors of the cascade even if nothing outside needs them.
    """
    refused: dict[str, str] = {}
    for _ in range(_MAX_ROUNDS):
        lowering = _Lowering(graph, refused, keep)
        lowering.run()
        try:
            return lowering.finish()
        except Unwritten as error:
            nodes = {lowering.maker.get(value.number, "") for value in error.values} - {"", *refused}
            if not nodes:
                # The values belong to no single op: every op that stands on them stays.
                raise
            refused |= dict.fromkeys(nodes, "its elements are not at affine places of another tensor's")
    raise AssertionError("more ops than rounds have no affine form")


class _Lowering:
    def __init__(self, graph: Graph, refused: Mapping[str, str], keep: Collection[str]) -> None:
        self.graph, self.refused, self.keep = graph, refused, keep
        self.program = Program()
        self.values: dict[str, Any] = {}
        self.kept: dict[str, str] = {}
        #: Value number -> the graph node whose handler made it.
        self.maker: dict[int, str] = {}
        self.storages = Storages(graph)

    def run(self) -> None:
        for position, node in enumerate(self.graph.nodes):
            before = len(self.program.values)
            self.program.hint, self.program.line = node.name, position
            self.values[node.name] = self._visit(node)
            for value in self.program.values[before:]:
                self.maker[value.number] = node.name

    def _visit(self, node: Node) -> Any:
        if node.op in ("input", "constant", "call"):
            return self._leaf(node)
        if node.op == "getitem":
            return self._part(node)
        try:
            return self._lower(node)
        except NotRaised as error:
            if isinstance(node.type, TensorType | TupleType):
                self.kept[node.name] = str(error)
            return self._leaf(node)

    def _lower(self, node: Node) -> Any:
        if node.name in self.refused:
            raise NotRaised(self.refused[node.name])
        if isinstance(node.type, ScalarType):
            return node.type
        handler = handler_of(node.op)
        if handler is None:
            raise NotRaised("no rule for this op")
        if has_effect(node, self.graph):
            raise NotRaised("the op writes memory or draws random numbers")
        if is_view(node) and self.storages.root(node.name) in self.storages.written:
            raise NotRaised("the memory that it shows is written to")
        found = handler(self.program, Call(node, self.values))
        self._check(node, found)
        return found

    def _check(self, node: Node, found: Any) -> None:
        """A handler must give exactly the shapes that the graph says."""
        pairs = [(node.type, found)]
        if isinstance(node.type, TupleType):
            pairs = list(zip(node.type.items, found, strict=False))
        for wanted, value in pairs:
            if isinstance(wanted, TensorType) and not same_shape(wanted.shape, value.shape):
                raise NotRaised(f"raised with the shape {value.shape}, not {wanted.shape}")

    def _part(self, node: Node) -> Any:
        source, position = node.args
        whole = self.values.get(source.name) if isinstance(source, Ref) else None
        if isinstance(whole, tuple) and isinstance(position, int) and position < len(whole):
            part = whole[position]
            if isinstance(part, Value):
                return part
        return self._leaf(node)

    def _leaf(self, node: Node) -> Any:
        found = node.type
        if not isinstance(found, TensorType):
            return found if isinstance(found, ScalarType) else None
        if found.dtype not in PRECISION and found.dtype not in INTEGERS and found.dtype != "b1":
            return None
        try:
            return self.program.leaf(node.name, found.shape, found.dtype)
        except NotRaised:
            return None

    # Einsums ---------------------------------------------------------------------------------------------------------

    def finish(self) -> Raised:
        names: dict[int, list[tuple[str, Value]]] = {}
        for node in self.graph.nodes:
            value = self.values.get(node.name)
            if isinstance(value, Value):
                names.setdefault(_same_elements(value).number, []).append((node.name, value))
        for number, known in names.items():
            # A node that is the value itself comes before one that adds or drops dimensions.
            known.sort(key=lambda item: item[1].number != number)
        roots = self._roots()
        emitted = emit(self.program, roots, names)
        tensor_of = {}
        for node in self.graph.nodes:
            value = self.values.get(node.name)
            if isinstance(value, Value):
                tensor_of[node.name] = emitted.names.get(base(value).number, "")
        sizes = {symbol.name: size for symbol, size in emitted.sizes.items()}
        needed = frozenset(emitted.names[base(root).number] for root in roots)
        raw_sizes = {symbol.name: size for symbol, size in emitted.raw_sizes.items()}
        return Raised(
            self.graph, emitted.cascade, emitted.tensors, sizes, self.kept, tensor_of, needed, emitted.raw, raw_sizes
        )

    def _roots(self) -> list[Value]:
        """Values that are needed as such: by ops that stay, and by whoever runs the graph."""
        wanted = [*self.graph.output_names(), *self.keep]
        for node in self.graph.nodes:
            value = self.values.get(node.name)
            stays = not isinstance(value, Value | tuple) or (
                isinstance(value, Value) and isinstance(value.step, Leaf) and value.step.node == node.name
            )
            if stays and node.op != "getitem":
                wanted += node.operands()
        roots: dict[int, Value] = {}
        for name in wanted:
            value = self.values.get(name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Value):
                    roots.setdefault(part.number, part)
        return list(roots.values())


def _same_elements(value: Value) -> Value:
    """The value that this one is, but for dimensions of size 1."""
    while isinstance(value.step, Regroup):
        shown = value.step.operands[0]
        if [size for size in shown.shape if not equal(size, 1)] != [size for size in value.shape if not equal(size, 1)]:
            break
        value = shown
    return value
