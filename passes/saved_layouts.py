"""Keep for the backward what the forward's convolutions read: images and weights in channels-last order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.graph import Argument, Graph, Node, Ref, Symbol, substitute
from ..ir.types import TensorType
from .effects import Storages
from .rewriting import rebuild, rename_node

CONVOLUTION = "aten.convolution.default"


@dataclass(frozen=True)
class SavedLayouts:
    """Save the channels-last copy of a convolution's input or weight in place of the input itself.

    Convolutions on the CPU run in channels-last order (oneDNN's), so a contiguous image or weight is copied into it
    before it is used. Where the backward needs the value again, the copy is worth keeping: it costs the bytes of the
    value, and saves the same copy in the backward. Only for inputs of a forward graph with four static dimensions that
    no op writes to.

    rewrite::

        %y = aten.convolution.default(%x, %w, ...)     %w_cl = aten.clone.default(%w, memory_format=channels_last)
                                                   ->  %y = aten.convolution.default(%x, %w_cl, ...)
        return (%y, %w)                                return (%y, %w_cl)
    """

    name: ClassVar[str] = "saved-layouts"

    def apply(self, graph: Graph) -> Graph:
        if not graph.saved:
            return graph
        saved = {output.name for output in graph.outputs[-graph.saved :] if isinstance(output, Ref)}
        written = Storages(graph).written
        inputs = {
            node.name: node.type
            for node in graph.inputs
            if node.name in saved - written and isinstance(node.type, TensorType) and gains(node.type)
        }
        copies: dict[str, Argument] = {}
        nodes: list[Node] = []
        for node in graph.nodes:
            if node.op == CONVOLUTION:
                for operand in node.args[:2]:
                    if isinstance(operand, Ref) and operand.name in inputs and operand.name not in copies:
                        copy = channels_last_copy(graph, operand.name, inputs[operand.name], node)
                        copies[operand.name] = Ref(copy.name)
                        nodes.append(copy)
                node = rename_node(node, copies)
            nodes.append(node)
        if not copies:
            return graph
        return replace(rebuild(graph, nodes), outputs=with_copies(graph, copies))


def gains(kind: TensorType) -> bool:
    """Whether a value of this type lies in memory otherwise in channels-last order."""
    if kind.device != "cpu" or kind.stride is not None or len(kind.shape) != 4:
        return False
    _, channels, height, width = kind.shape
    static = all(isinstance(size, int) for size in kind.shape)
    return static and channels != 1 and (height, width) != (1, 1) and 0 not in kind.shape


def channels_last_copy(graph: Graph, name: str, kind: TensorType, user: Node) -> Node:
    _, channels, height, width = kind.shape
    stride = (channels * height * width, 1, channels * width, channels)
    taken = {node.name for node in graph.nodes}
    fresh = f"{name}_channels_last"
    while fresh in taken:
        fresh += "_"
    return Node(
        fresh,
        "aten.clone.default",
        (Ref(name),),
        (("memory_format", Symbol("torch.channels_last")),),
        replace(kind, stride=stride),
        user.location,
        origin=f"saved-layouts(%{name})",
    )


def with_copies(graph: Graph, copies: Mapping[str, Argument]) -> tuple[Argument, ...]:
    """The graph's outputs; only what is saved is replaced, for what is returned belongs to the caller."""
    first = len(graph.outputs) - graph.saved
    renamed = (substitute(output, lambda name: copies.get(name, Ref(name))) for output in graph.outputs[first:])
    return (*graph.outputs[:first], *renamed)
