"""Memory that a library op allocates for itself and gives back before it ends.

Read from ATen's CPU kernels of torch 2.13 and checked against the allocator in the tests; 0 where nothing is known.
CUDA libraries keep workspaces of their own outside of the tensors' memory.
"""

from __future__ import annotations

from ..ir.graph import Node
from .devices import Device
from .flops import Call
from .op_classes import ATTENTION_BACKWARD, ATTENTION_FORWARD, CONVOLUTION, packet
from .tensors import TensorTable


def workspace_bytes(node: Node, table: TensorTable, device: Device) -> int:
    """Bytes that the op holds at most beyond its operands and results."""
    if device.kind != "cpu":
        return 0
    fused = table.cascade(node)
    if fused is not None:
        return fused.thread_bytes * device.thread_count + fused.shared_bytes
    base = packet(node.op)
    if base in ATTENTION_FORWARD:
        return _attention(Call(node, table), device, 0)
    if base in ATTENTION_BACKWARD:
        return _attention(Call(node, table), device, 1)
    if base in CONVOLUTION:
        read = [tensor.bytes for tensor in table.read(node)]
        made = [tensor.bytes for tensor in table.of(node.name)]
        parts = table.spans(node.name)
        if base == "aten.convolution_backward" and parts is not None and len(read) >= 3:
            to_given, to_weight = (sum(made[part]) for part in parts[:2])
            return _convolution_backward(read, to_given, to_weight)
        return max(sum(read[:2]), sum(made))  # operands and result in oneDNN's layout, then the result in both
    return 0


def _convolution_backward(read: list[int], to_given: int, to_weight: int) -> int:
    """``read``: bytes of the result's gradient, the input and the weight; then those of the gradients made. First the
    input's gradient, then the weight's, each from operands reordered to oneDNN's blocks of channels, and for a moment
    in both layouts. (Blocks that are not full are padded; the few channels of an image are not reordered.)"""
    gradient, given, weight = read[:3]
    phases = [0]
    if to_given:
        phases += [gradient + weight + to_given, 2 * to_given]
    if to_weight:
        phases += [to_given + gradient + given + to_weight, to_given + 2 * to_weight]
    return max(0, max(phases) - to_given - to_weight)


def _attention(call: Call, device: Device, first: int) -> int:
    """Flash attention on CPU holds tiles in f32 for every thread: in the forward scores, two row statistics and the
    output; in the backward scores and their gradient (ATen/native/cpu/FlashAttentionKernel.cpp)."""
    query, key = call.shape(first, "query"), call.shape(first + 1, "key")
    if len(query) != 4 or len(key) != 4:
        return 0
    rows = min(query[2], 256 if query[2] >= 768 else 64 if query[2] >= 192 else 32)
    columns = min(key[2], 512)
    tile = 2 * rows * columns if first else rows * (columns + 2 + query[3])
    tensor = call.tensor(first, "query")
    halves = rows * columns * 2 if tensor is not None and tensor.dtype in ("bf16", "f16") else 0
    return (4 * tile + halves) * device.thread_count
