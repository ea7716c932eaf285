"""Seconds of a library's attention and convolution on a calibrated CPU, by laws fitted to some that were measured.

    attention    o + pairs · a + pairs · d · b + rows · d · c
    convolution  o + flop · a + elements · b + weights · c

``pairs``: of a query and a key, in all heads, that the kernel works out; a is the softmax, b the products, c copies of
the operands' rows. A convolution's elements are those of its input and its result, its weights are put into another
order at every call; o is what a library prepares beside its call. The coefficients are least squares on relative
errors, none below zero, forward and backward apart. Convolutions of one dimension, and those in groups, have laws of
their own: their kernels are others, and with few features a group no product is among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.graph import Node
from .devices import Figure
from .flops import Call, Shape, contraction_flop, is_causal
from .law_fit import nonnegative_fit
from .op_classes import ATTENTION_BACKWARD, kind_of, packet
from .tensors import TensorTable

#: Kind of op -> names of its coefficients in ``Device.added``, after the kind, or the kind and ``_backward``.
LAWS = {
    "attention": ("once", "pair", "pair_feature", "row_feature"),
    "convolution": ("once", "flop", "element", "weight"),
    "grouped_convolution": ("once", "flop", "element", "weight"),
    "sequence_convolution": ("once", "flop", "element", "weight"),
}
#: Keys that PyTorch's kernel for CPUs takes at once (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, torch 2.13): a
#: causal mask saves whole blocks of them.
KEYS_AT_ONCE = 512

#: What the coefficients are multiplied with.
Parts = tuple[float, float, float, float]


@dataclass(frozen=True)
class AttentionSize:
    """``heads``: of all samples."""

    heads: int
    queries: int
    keys: int
    features: int
    causal: bool

    @property
    def pairs(self) -> int:
        if not self.causal:
            return self.heads * self.queries * self.keys
        blocks = range(0, self.keys, KEYS_AT_ONCE)
        return self.heads * sum(max(0, self.queries - begin) * min(KEYS_AT_ONCE, self.keys - begin) for begin in blocks)

    @property
    def parts(self) -> Parts:
        rows = self.heads * (self.queries + self.keys)
        return 1.0, float(self.pairs), float(self.pairs * self.features), float(rows * self.features)


def law_seconds(node: Node, table: TensorTable, added: Mapping[str, Figure]) -> float | None:
    """Seconds of an op without its call; None where no law was measured, or for operands in another layout."""
    kind = kind_of(node.op)
    parts: Parts | None = None
    if kind == "convolution":
        shapes = _shapes(node, table)
        kind, parts = convolution_law(*shapes), convolution_parts(*shapes, contraction_flop(node, table))
    elif kind == "attention":
        parts = _attention(node, table)
    names = names_of(kind, "backward" in node.op)
    if not names or names[0] not in added:
        return None
    return math.fsum(added[name].value * part for name, part in zip(names, parts, strict=True)) if parts else None


def names_of(kind: str, backward: bool) -> tuple[str, ...]:
    return tuple(f"{kind}_backward_{name}" if backward else f"{kind}_{name}" for name in LAWS.get(kind, ()))


def fit_law(kind: str, backward: bool, parts: Sequence[Parts], seconds: Sequence[float]) -> dict[str, float]:
    """The coefficients by their names in ``Device.added``; ``seconds`` without the calls."""
    return dict(zip(names_of(kind, backward), nonnegative_fit(parts, seconds), strict=True))


def _attention(node: Node, table: TensorTable) -> Parts | None:
    """Of operands [samples, heads, rows, features]."""
    base = packet(node.op)
    call = Call(node, table)
    first = 1 if base in ATTENTION_BACKWARD else 0
    query, key = call.shape(first, "query"), call.shape(first + 1, "key")
    if len(query) != 4 or len(key) != 4:
        return None
    return AttentionSize(query[0] * query[1], query[2], key[2], query[3], is_causal(node, base)).parts


def _shapes(node: Node, table: TensorTable) -> tuple[Shape, Shape, Shape]:
    """Of a convolution's result, operand and weight."""
    call = Call(node, table)
    if "backward" in node.op:  # (gradient of the result, operand, weight, ...)
        return call.shape(0), call.shape(1), call.shape(2)
    return call.outputs()[0].shape if call.outputs() else (), call.shape(0), call.shape(1)


def convolution_law(result: Shape, operand: Shape, weight: Shape) -> str:
    """Which law the kernels for these shapes ([samples, features, ...], weight [features, features of a group, ...])
    have."""
    if len(weight) == 3:
        return "sequence_convolution"
    dense = weight[:2] in ((result[1:2] + operand[1:2]), (operand[1:2] + result[1:2]))
    return "convolution" if dense else "grouped_convolution"


def convolution_parts(result: Shape, operand: Shape, weight: Shape, flop: float) -> Parts:
    return 1.0, float(flop), float(math.prod(result) + math.prod(operand)), float(math.prod(weight))
