"""What the caller's loss holds between a forward and its backward, where the compiled function does not compute it.

A function that hands out logits leaves the loss to the caller, in eager mode. When the gradient of the outputs is
formed, the outputs (the caller may hold them), what the loss has saved, gradients inside it and the gradient itself are
in memory at once. By the allocator's count at that moment, in bytes of the outputs, with the outputs held (torch 2.13):

    huber_loss                                                          2
    mse_loss, smooth_l1_loss, binary_cross_entropy_with_logits          3
    cross_entropy (also with label smoothing, also of a shifted view)   4
    l1_loss, output.square().mean(), ((output - y) ** 2).sum(),
    kl_div(log_softmax(output), y)                                      5

Five are counted: the outputs, their gradients (until the backward has read them), and three more at that moment.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.graph import Graph, Node, references
from ..ir.types import TensorType
from .op_classes import kind_of
from .tensors import Bindings, Tensor, concrete

#: How a plan names that moment, and why the memory is held.
NAME = "loss outside the graph"
#: Its value and the gradient that the backward begins with are scalars, held until the backward ends: at most of f64.
HELD = "loss and its gradient"
LOSS_BYTES = 2 * 8
#: Bytes held besides the outputs and their gradients, in bytes of the outputs.
COPIES = 3


def outside_loss_bytes(
    graph: Graph, user_outputs: int, tangents: Sequence[Node], bindings: Bindings | None = None
) -> int:
    """Bytes that a loss outside holds besides outputs and their gradients.

    ``graph`` is a joint graph or a forward, with the caller's outputs first; ``tangents`` are the gradients that its
    backward takes.

    An output counts if it takes a gradient, is no scalar, and no scalar output that takes one is computed from it or
    from what it is computed from: that scalar is its loss, inside. Raises ShapeError for a size without a binding.
    """
    known = bindings or {}
    nodes = {node.name: node for node in graph.nodes}
    outputs = [nodes[name] for output in graph.outputs[:user_outputs] for name in references(output)]
    given = [concrete(node.type, known) for node in tangents if isinstance(node.type, TensorType)]
    free = [(node, concrete(node.type, known)) for node in outputs if isinstance(node.type, TensorType)]
    taken: list[tuple[Node | None, Tensor]] = []
    for tangent in given:
        alike = (entry for entry in free if (entry[1].dtype, entry[1].shape) == (tangent.dtype, tangent.shape))
        found = next(alike, None)
        if found is not None:
            free.remove(found)
        taken.append((found[0] if found is not None else None, tangent))
    behind = _ancestors(nodes, [node for node, tangent in taken if node is not None and tangent.elements == 1])
    outside = 0
    for node, tangent in taken:
        inside = node is not None and not behind.isdisjoint(_made_from(nodes, node))
        if tangent.elements > 1 and not inside:
            outside += tangent.storage
    return COPIES * outside


def _made_from(nodes: dict[str, Node], value: Node) -> set[str]:
    """A value, the op that computes it, and the results that this one reads, whatever views are in between."""
    found: set[str] = set()
    waiting = [(value.name, 1)]
    while waiting:
        name, computed = waiting.pop()
        found.add(name)
        left = computed if kind_of(nodes[name].op) == "view" else computed - 1
        if left >= 0:
            waiting.extend((operand, left) for operand in nodes[name].operands())
    return found


def _ancestors(nodes: dict[str, Node], begin: Sequence[Node]) -> set[str]:
    """Names of the ops whose results ``begin`` are computed from, inputs left out."""
    waiting = [node.name for node in begin]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found and nodes[name].op != "input":
            found.add(name)
            waiting.extend(nodes[name].operands())
    return found
