"""Setting the device of a captured graph: captures are made on the CPU, and the target is written in afterwards."""

from __future__ import annotations

from dataclasses import replace

from ..ir.fused_cascade import FusedCascade
from ..ir.graph import Argument, Graph, Symbol
from ..ir.types import TensorType, TupleType, Type

__all__ = ["rewrite_device"]


def rewrite_device(graph: Graph, device: str) -> Graph:
    """The graph with every value, and every device named as an argument, on ``device``."""
    nodes = tuple(
        replace(
            node,
            type=None if node.type is None else _type(node.type, device),
            args=tuple(_argument(value, device) for value in node.args),
            kwargs=tuple((key, _argument(value, device)) for key, value in node.kwargs),
        )
        for node in graph.nodes
    )
    subgraphs = {name: rewrite_device(body, device) for name, body in graph.subgraphs.items()}
    cascades = {name: _cascade(fused, device) for name, fused in graph.cascades.items()}
    return replace(graph.with_nodes(nodes, subgraphs=subgraphs), cascades=cascades)


def _cascade(fused: FusedCascade, device: str) -> FusedCascade:
    def moved(kinds: tuple[TensorType, ...]) -> tuple[TensorType, ...]:
        return tuple(replace(kind, device=device) for kind in kinds)

    return replace(fused, operands=moved(fused.operands), results=moved(fused.results))


def _type(kind: Type, device: str) -> Type:
    if isinstance(kind, TensorType):
        return replace(kind, device=device)
    if isinstance(kind, TupleType):
        return TupleType(tuple(_type(item, device) for item in kind.items))
    return kind


def _argument(argument: Argument, device: str) -> Argument:
    if isinstance(argument, tuple):
        return tuple(_argument(item, device) for item in argument)
    if isinstance(argument, Symbol) and argument.text.startswith("device("):
        return Symbol(f"device({device})")
    return argument
