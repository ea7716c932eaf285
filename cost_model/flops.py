"""Floating-point operations of matrix products, convolutions and attention: exact formulas.

A multiply-add counts as two operations, and only these three families are counted here (what model FLOP utilisation is
made of); ``contraction_flop`` agrees with ``torch.utils.flop_counter`` wherever that counts. As there, a causal mask is
not subtracted: ``executed_fraction`` says what part a kernel that skips masked tiles really does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..ir.graph import Argument, Node
from .grouped_products import BACKWARD, GROUPED
from .op_classes import ATTENTION_BACKWARD, ATTENTION_FORWARD, packet
from .tensors import Tensor, TensorTable, evaluate

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One op with its operands' tensors: what a FLOP formula reads."""

    node: Node
    table: TensorTable

    def argument(self, position: int, name: str = "") -> Argument:
        if position < len(self.node.args):
            return self.node.args[position]
        return dict(self.node.kwargs).get(name)

    def tensor(self, position: int, name: str = "") -> Tensor | None:
        return self.table.operand(self.argument(position, name))

    def shape(self, position: int, name: str = "") -> Shape:
        found = self.tensor(position, name)
        return found.shape if found is not None else ()

    def outputs(self) -> tuple[Tensor, ...]:
        return self.table.of(self.node.name)


def contraction_flop(node: Node, table: TensorTable) -> int:
    """Operations of a matrix product, convolution or attention op; 0 for every other op."""
    formula = FORMULAS.get(packet(node.op))
    return formula(Call(node, table)) if formula is not None else 0


def executed_fraction(node: Node, table: TensorTable) -> float:
    """Part of ``contraction_flop`` that is executed: causal attention over s queries and keys does (s + 1) / 2s."""
    base = packet(node.op)
    if base not in ATTENTION_FORWARD and base not in ATTENTION_BACKWARD:
        return 1.0
    if not is_causal(node, base):
        return 1.0
    call = Call(node, table)
    first = 1 if base in ATTENTION_BACKWARD else 0
    queries, keys = call.shape(first)[-2:-1], call.shape(first + 1)[-2:-1]
    if not queries or not keys or not keys[0]:
        return 1.0
    return _causal_pairs(queries[0], keys[0]) / max(1, queries[0] * keys[0])


def _causal_pairs(queries: int, keys: int) -> int:
    """Pairs (query, key) with key <= query."""
    full = max(0, queries - keys)
    stepped = queries - full
    return stepped * (stepped + 1) // 2 + full * keys


#: Where ``is_causal`` stands among the arguments; -1: only as a keyword.
_CAUSAL_POSITION = {
    "aten.scaled_dot_product_attention": 5,
    "aten._scaled_dot_product_flash_attention": 4,
    "aten._scaled_dot_product_flash_attention_for_cpu": 4,
    "aten._scaled_dot_product_efficient_attention": 6,
    "aten._scaled_dot_product_cudnn_attention": 6,
    "aten._scaled_dot_product_fused_attention_overrideable": 5,
    "aten._scaled_dot_product_flash_attention_backward": 11,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": 7,
    "aten._scaled_dot_product_efficient_attention_backward": 11,
    "aten._scaled_dot_product_cudnn_attention_backward": 14,
}


def is_causal(node: Node, base: str) -> bool:
    """Whether an attention op, ``base`` its packet, masks keys behind each query by itself."""
    position = _CAUSAL_POSITION.get(base, -1)
    if 0 <= position < len(node.args):
        return node.args[position] is True
    return dict(node.kwargs).get("is_causal") is True


def _product(left: Shape, right: Shape) -> int:
    """(..., m, k) @ (..., k, n) with broadcast batches; vectors count as a row or a column."""
    left = (1, *left) if len(left) == 1 else left
    right = (*right, 1) if len(right) == 1 else right
    rows, inner, columns = left[-2], left[-1], right[-1]
    batch = math.prod(_broadcast(left[:-2], right[:-2]))
    return 2 * batch * rows * inner * columns


def _broadcast(left: Shape, right: Shape) -> Shape:
    width = max(len(left), len(right))
    padded = ((1,) * (width - len(left)) + left, (1,) * (width - len(right)) + right)
    return tuple(b if a == 1 else a for a, b in zip(*padded, strict=True))


def _linear(call: Call) -> int:
    x, weight = call.shape(0, "input"), call.shape(1, "weight")
    return 2 * math.prod(x) * weight[0] if len(weight) == 2 else 2 * math.prod(x)


def _grouped(call: Call) -> int:
    """Each row of a ragged operand meets one group's matrix: of all groups together, whatever rows each has."""
    left, right = call.shape(0), call.shape(1)
    if packet(call.node.op) in BACKWARD:  # of the rows and of the matrices
        return 4 * left[0] * left[1] * right[2] if len(right) == 3 else 0
    if len(left) == 2 and len(right) == 3:
        return 2 * left[0] * left[1] * right[2]
    if len(left) == 3 and len(right) == 2:
        return 2 * left[1] * left[2] * right[1]
    if len(left) == 2 and len(right) == 2:
        return 2 * left[0] * left[1] * right[1]
    return _product(left, right)


def _convolved(x: Shape, weight: Shape, out: Shape, transposed: bool) -> int:
    """Each point of the output (of the input, when transposed) meets the whole filter: 2 N points prod(weight)."""
    points = (x if transposed else out)[2:]
    return 2 * x[0] * math.prod(points) * math.prod(weight)


def _convolution(call: Call) -> int:
    x, weight = call.shape(0, "input"), call.shape(1, "weight")
    transposed = call.argument(6, "transposed") is True or "transpose" in call.node.op
    out = call.outputs()[0].shape
    if len(x) == len(weight) - 1:  # a single image without batch
        x, out = (1, *x), (1, *out)
    return _convolved(x, weight, out, transposed)


def _convolution_backward(call: Call) -> int:
    """Gradient of the input: the transposed convolution; of the weight: the input convolved with the gradient."""
    gradient, x, weight = call.shape(0), call.shape(1), call.shape(2)
    transposed = call.argument(7, "transposed") is True
    mask = call.argument(10, "output_mask")
    wanted = mask if isinstance(mask, tuple) else (True, True, True)
    flop = 0
    if wanted[0]:
        flop += _convolved(gradient, weight, x, not transposed)
    if wanted[1]:
        image, filter_, result = (gradient, x, weight) if transposed else (x, gradient, weight)
        flop += _convolved(_swap(image), _swap(filter_), _swap(result), False)
    return flop


def _swap(shape: Shape) -> Shape:
    return (shape[1], shape[0], *shape[2:])


def _attention(call: Call) -> int:
    return _attention_flop(call.shape(0, "query"), call.shape(1, "key"), call.shape(2, "value"))


def _attention_flop(query: Shape, key: Shape, value: Shape) -> int:
    """scores = Q Kᵀ and out = P V, for every query head."""
    pairs = math.prod(query[:-1]) * key[-2]
    return 2 * pairs * (query[-1] + value[-1])


def _attention_backward(call: Call) -> int:
    """Scores again, dP = dO Vᵀ, dV = Pᵀ dO, dQ = dS K, dK = dSᵀ Q: three products of d_q and two of d_v."""
    query, key, value = call.shape(1, "query"), call.shape(2, "key"), call.shape(3, "value")
    pairs = math.prod(query[:-1]) * key[-2]
    return 2 * pairs * (3 * query[-1] + 2 * value[-1])


def _rows_first(formula: Callable[[Shape, Shape, Shape], int]) -> Callable[[Call], int]:
    """For ops whose operands are (batch, sequence, heads, d)."""

    def swapped(call: Call) -> int:
        offset = 1 if "backward" in call.node.op else 0
        shapes = [call.shape(offset + i) for i in range(3)]
        if any(len(shape) != 4 for shape in shapes):  # ragged: (tokens, heads, d); lengths are data
            return 0
        query, key, value = ((s[0], s[2], s[1], s[3]) for s in shapes)
        return formula(query, key, value)

    return swapped


def _backward_flop(query: Shape, key: Shape, value: Shape) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _outer(call: Call) -> int:
    """Outer products: one multiplication an element of the output."""
    return sum(tensor.elements for tensor in call.outputs())


def _pair(first: int, second: int) -> Callable[[Call], int]:
    return lambda call: _product(call.shape(first), call.shape(second))


def _cascade(call: Call) -> int:
    """Two operations for each point of an Einsum that sums a product of tensors."""
    fused = call.table.cascade(call.node)
    if fused is None:
        return 0
    sizes = {name: evaluate(size, call.table.bindings) for name, size in fused.sizes.items()}
    sums = [einsum for einsum in fused.cascade.einsums if einsum.reduction == "sum" and len(einsum.reads) > 1]
    return sum(2 * math.prod(sizes[symbol.name] for symbol in einsum.space) for einsum in sums)


FORMULAS: dict[str, Callable[[Call], int]] = {
    **dict.fromkeys(
        ("aten.mm", "aten.bmm", "aten.matmul", "aten.mv", "aten.dot", "aten.vdot", "aten._scaled_mm", "aten._int_mm"),
        _pair(0, 1),
    ),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addbmm", "aten.addmv", "aten._addmm_activation"), _pair(1, 2)),
    **dict.fromkeys(("aten.linear", "mkldnn._linear_pointwise", "mkl._mkl_linear"), _linear),
    **dict.fromkeys(GROUPED, _grouped),
    **dict.fromkeys(("aten.addr", "aten.ger", "aten.outer"), _outer),
    **dict.fromkeys(
        (
            "aten.convolution aten._convolution aten.conv1d aten.conv2d aten.conv3d aten.conv_transpose1d "
            "aten.conv_transpose2d aten.conv_transpose3d aten.convolution_overrideable aten.mkldnn_convolution "
            "aten.cudnn_convolution aten._slow_conv2d_forward mkldnn._convolution_pointwise "
            "mkldnn._convolution_transpose_pointwise"
        ).split(),
        _convolution,
    ),
    "aten.convolution_backward": _convolution_backward,
    **dict.fromkeys(ATTENTION_FORWARD, _attention),
    **dict.fromkeys(ATTENTION_BACKWARD, _attention_backward),
    "effcc.cascade": _cascade,
    "aten._flash_attention_forward": _rows_first(_attention_flop),
    "aten._efficient_attention_forward": _rows_first(_attention_flop),
    "aten._flash_attention_backward": _rows_first(_backward_flop),
    "aten._efficient_attention_backward": _rows_first(_backward_flop),
}
