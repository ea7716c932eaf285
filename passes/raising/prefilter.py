"""Whether a graph can hold anything worth fusing, from the sizes of its ops alone: most graphs cannot, and raising one
takes milliseconds an op.

What fusion saves is the traffic of wide tensors: results of matrix products, and of ops that combine operands which are
smaller than what comes out, be it one that is repeated (keys and values that several heads of queries share). A product
over a long rank costs more than its result's traffic ever can, so it counts only where its result is large enough to be
kept out of memory for its own sake.
"""

from __future__ import annotations

from ...cost_model.op_classes import kind_of
from ...cost_model.roofline import gemm_shape
from ...cost_model.tensors import TensorTable
from ...errors import ShapeError
from ...ir.graph import Graph, Node
from ...ir.types import DTYPES
from .choose import Choice

#: Times that a wide tensor is written and read at most, by the kernels that fusion replaces.
_MOVES = 8


def may_fuse(graph: Graph, choice: Choice) -> bool:
    """False where ``choose`` would take nothing of ``graph`` itself (its subgraphs are left out)."""
    table = TensorTable(graph)
    try:
        return any(_is_wide(node, table, choice) for node in graph.nodes)
    except ShapeError:  # sizes that are known at run time only
        return True


def _is_wide(node: Node, table: TensorTable, choice: Choice) -> bool:
    kind = kind_of(node.op)
    if kind not in ("gemm", "pointwise"):
        return False
    made = max(table.of(node.name), key=lambda tensor: tensor.bytes, default=None)
    if made is None or _MOVES * made.bytes < choice.saved_bytes:
        return False
    if kind == "pointwise":
        read = table.read(node)
        distinct = [tensor.bytes // DTYPES[tensor.dtype][1] for tensor in read]
        return bool(read) and all(elements < made.elements for elements in distinct)
    _, _, k, _ = gemm_shape(node, table)
    flops, moved = 2 * made.elements * k, _MOVES * made.bytes
    rates = choice.rates
    return made.bytes >= choice.wide_bytes or (
        rates.moving(moved, made.bytes) >= (choice.gain - 1) * flops / rates.library_of(table.read(node)[-1].dtype)
    )
