"""What the ops of a generated kernel add to the time that its bytes take, from a calibrated device's figures.

The figures are seconds an element for a few measured ops (``generated_probes.py``); this table says which of them an
ATen op is made of once Inductor has taken it apart. An op that is in no row adds nothing: an addition or a comparison
is done while the next elements are on their way.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..ir.graph import Node
from .devices import Figure
from .op_classes import kind_of, packet
from .random_draws import draw_seconds, drawn
from .tensors import Tensor, TensorTable

_ADDED: dict[str, tuple[str, ...]] = {
    "exp": ("exp",), "exp2": ("exp",), "expm1": ("exp",), "log": ("log",), "log2": ("log",), "log1p": ("log",),
    "tanh": ("tanh",), "erf": ("erf",), "sigmoid": ("sigmoid",), "silu": ("sigmoid",), "silu_backward": ("sigmoid",),
    "log_sigmoid_forward": ("exp", "log"), "softplus": ("exp", "log"), "softplus_backward": ("exp",), "elu": ("exp",),
    "rsqrt": ("rsqrt",), "sqrt": ("rsqrt",), "div": ("div",), "reciprocal": ("div",), "sin": ("sin",), "cos": ("sin",),
    "_softmax": ("amax", "exp", "sum", "div"), "_safe_softmax": ("amax", "exp", "sum", "div"),
    "_log_softmax": ("amax", "exp", "sum"), "_softmax_backward_data": ("sum",),
    "_log_softmax_backward_data": ("sum", "exp"), "logsumexp": ("amax", "exp", "sum"),
    "native_layer_norm": ("var_mean",), "native_group_norm": ("var_mean",), "_fused_rms_norm": ("sum",),
    "native_layer_norm_backward": ("sum", "sum", "mean", "mean"), "native_batch_norm": ("mean", "mean"),
    "var_mean": ("var_mean",), "var": ("var_mean",), "std": ("var_mean",), "std_mean": ("var_mean",),
    "amax": ("amax",), "amin": ("amax",), "max": ("amax",), "min": ("amax",), "argmax": ("amax",), "argmin": ("amax",),
    "sum": ("sum",), "mean": ("sum",), "prod": ("sum",), "any": ("amax",), "all": ("amax",),
}  # fmt: skip
#: Exponents that become multiplications and square roots.
_PLAIN_POWERS = frozenset({0.5, -0.5, 1.0, -1.0, 2.0, 3.0, 4.0, -2.0})
_OVER_ROWS = frozenset({"sum", "mean", "prod", "amax", "amin", "var_mean", "var", "any", "all"})


def added_seconds(node: Node, table: TensorTable, added: Mapping[str, Figure]) -> float:
    """Seconds that a node adds to its kernel; ``added`` are the device's figures."""
    numbers = drawn(node, table)
    if numbers is not None:
        return draw_seconds(*numbers, added)
    name = packet(node.op).partition(".")[2]
    parts = _parts(node, name, table)
    if not parts:
        return 0.0
    elements = max((tensor.elements for tensor in table.of(node.name)), default=0)
    if kind_of(node.op) == "reduction":
        elements = max([elements, *(tensor.elements for tensor in table.read(node))])
    return elements * sum(added[part].value for part in parts if part in added)


def stored_seconds(tensor: Tensor, added: Mapping[str, Figure]) -> float:
    """Seconds that a value takes beside its bytes when it is written out and read back: booleans go lane by lane."""
    if tensor.dtype != "b1":
        return 0.0
    return tensor.elements * sum(added[name].value for name in ("mask_write", "mask_read") if name in added)


def _parts(node: Node, name: str, table: TensorTable) -> tuple[str, ...]:
    if name in ("gelu", "gelu_backward"):
        smooth = dict(node.kwargs).get("approximate", "none") == "tanh" or "tanh" in node.args
        return ("tanh",) if smooth else ("erf",) if name == "gelu" else ("erf", "exp")
    if name == "pow":
        exponent = node.args[1] if len(node.args) > 1 else None
        plain = isinstance(exponent, int | float) and float(exponent) in _PLAIN_POWERS
        return () if plain else ("pow",)
    if name in _OVER_ROWS and _keeps_last(node, table):
        return ("mean",)
    return _ADDED.get(name, ())


def _keeps_last(node: Node, table: TensorTable) -> bool:
    """Whether a reduction walks across rows: the last dimension, whose elements are neighbours, is kept."""
    operands = table.read(node)
    dims = node.args[1] if len(node.args) > 1 else None
    if not operands or not isinstance(dims, tuple | list) or not operands[0].shape:
        return False
    rank = len(operands[0].shape)
    numbers = [dim % rank for dim in dims if isinstance(dim, int)]
    return bool(numbers) and rank - 1 not in numbers
