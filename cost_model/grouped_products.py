"""Grouped products (mixture of experts): rows sorted by group, each group's rows times that group's own matrix.

Besides PyTorch's ``_grouped_mm``, ops of libraries that do the same by a loop of plain products: a captured model has
them as ops nothing is known of, and their work is most of its step. How many rows a group has is data; equal shares are
assumed, which are what balanced routing aims at.
"""

from __future__ import annotations

from ..ir.graph import Node
from .op_classes import packet
from .tensors import TensorTable

Shape = tuple[int, ...]
#: Operands (rows, matrices) of forward ops.
FORWARD = frozenset({"aten._grouped_mm", "aten._scaled_grouped_mm", "transformers.grouped_mm_fallback"})
#: Operands (rows, matrices, ends of groups, gradient of the result): both gradients at once.
BACKWARD = frozenset({"transformers.grouped_mm_fallback_backward"})
GROUPED = FORWARD | BACKWARD
#: Those that are loops of products on every device.
LOOPS = frozenset({"transformers.grouped_mm_fallback"}) | BACKWARD


def grouped_shapes(node: Node, table: TensorTable) -> tuple[tuple[int, int, int, int], ...]:
    """(groups, m, k, n) of the products of a grouped op; none for other ops, and for operands of other ranks."""
    base = packet(node.op)
    if base not in GROUPED:
        return ()
    operands = [table.operand(argument) for argument in node.args[:2]]
    left, right = (operand.shape if operand is not None else () for operand in (*operands, None, None)[:2])
    if base in BACKWARD:
        if len(left) != 2 or len(right) != 3:
            return ()
        groups, k, n = right
        rows = _share(left[0], groups)
        return (groups, rows, n, k), (groups, k, rows, n)
    out = table.of(node.name)[0].shape
    if (len(left), len(right)) == (2, 3):
        return ((right[0], _share(left[0], right[0]), left[1], right[2]),)
    if (len(left), len(right)) == (3, 2):
        return ((left[0], left[1], left[2], _share(right[1], left[0])),)
    if (len(left), len(right)) == (2, 2) and len(out) == 3:  # the sum over rows is what is in groups
        return ((out[0], left[0], _share(left[1], out[0]), right[1]),)
    if (len(left), len(right)) == (3, 3):
        return ((left[0], left[1], left[2], right[2]),)
    return ()


def _share(rows: int, groups: int) -> int:
    return -(-rows // groups) if groups else rows
