"""Ops that Inductor gets wrong (torch 2.11 to 2.13). Those whose lowering gives a wrong number run as eager ops."""

from __future__ import annotations

import torch
import torch.fx as fx

_POOLING = {torch.ops.aten.avg_pool2d_backward.default, torch.ops.aten.avg_pool3d_backward.default}
#: Inductor turns these into a write through a view. Views of complex tensors are opaque calls to its scheduler, which
#: then does not know that the write changes the tensor behind the view, and may order a read of that before the write.
_SCATTERS = {
    torch.ops.aten.as_strided_scatter.default,
    torch.ops.aten.diagonal_scatter.default,
    torch.ops.aten.select_scatter.default,
    torch.ops.aten.slice_scatter.default,
}


def known_fault(node: fx.Node) -> str | None:
    """Why ``node`` must not be lowered by Inductor; None where nothing is known against it."""
    if node.target in _POOLING:
        # (gradient, operand, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
        ceil_mode, count_include_pad, divisor = node.args[5:8]
        if ceil_mode and count_include_pad and divisor is None:
            return "Inductor divides windows that end behind the padding by the whole kernel"
    if node.target in _SCATTERS and isinstance(value := node.meta.get("val"), torch.Tensor) and value.is_complex():
        return "Inductor may read a complex tensor before it is written through a view"
    return None


def avoid_faults(graph: fx.Graph) -> None:
    """Rewrite what Inductor's passes on joint graphs fail on, with the same meaning.

    Its attention patterns make a symbol without a source of the whole number in ``q @ k.T / 4``, and building guards
    then raises an IndexError."""
    for node in graph.nodes:
        if node.target in (torch.ops.aten.div.Tensor, torch.ops.aten.mul.Tensor) and type(node.args[1]) is int:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point() and abs(node.args[1]) < 1 << 53:
                node.args = (node.args[0], float(node.args[1]))
