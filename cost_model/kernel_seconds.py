"""Seconds of single kernels by the learned kernel-time model, where it applies; the roofline asks here first.

It applies to f32 matrix products, softmax, layer norm and pointwise ops on CUDA devices: what it was trained on.
Planner, predictions and reports all price work through ``roofline.py``, so they agree. The answer depends on sizes and
device alone, and is remembered.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..ir.graph import Node
from .devices import Device
from .op_classes import kind_of, packet
from .tensors import TensorTable

if TYPE_CHECKING:
    from .kernel_time.gpus import Gpu

#: Op -> op name of the kernel-time model's rows.
_PRODUCTS = {
    "aten.mm": "linear", "aten.addmm": "linear", "aten.linear": "linear", "aten.bmm": "bmm", "aten.baddbmm": "bmm",
}  # fmt: skip
_ROWS = {"aten._softmax": "softmax", "aten._log_softmax": "softmax", "aten.native_layer_norm": "ln"}
#: Figures within this of the published ones are the same figures, differently rounded.
_SAME = 0.05


@dataclass(frozen=True)
class Learned:
    """Seconds of a kernel on the device, without its launch, and the ends of their 90 % band."""

    seconds: float
    low: float
    high: float


class _Key(NamedTuple):
    """What tells devices apart here: name, bytes a second, f32 operations a second."""

    name: str
    bandwidth: float
    rate: float


def learned_seconds(node: Node, shape: tuple[int, int, int, int], table: TensorTable, device: Device) -> Learned | None:
    """What the kernel-time model says of an op that runs as one kernel, None where it says nothing. ``shape``: batch,
    m, k, n of a matrix product."""
    if device.kind != "cuda" or device.gemm:
        return None
    base = packet(node.op)
    kind = kind_of(node.op)
    if base not in _PRODUCTS and base not in _ROWS and kind != "pointwise":
        return None
    tensors = [*table.read(node), *table.of(node.name)]
    if not tensors or any(tensor.dtype != "f32" for tensor in tensors):
        return None
    key = _Key(device.name, device.bandwidth, device.vector_rate("f32"))
    if base in _PRODUCTS:
        batch, rows, depth, columns = shape
        return _seconds(_PRODUCTS[base], (batch, rows, depth, columns), 2, key)
    outputs = table.of(node.name)
    elements = max(tensor.elements for tensor in outputs)
    if elements == 0:
        return None
    width = outputs[0].shape[-1] if outputs[0].shape else 1
    sizes = (elements // max(1, width), width)
    if base in _ROWS:
        return _seconds(_ROWS[base], sizes, 1, key)
    whole = [tensor for tensor in table.read(node) if tensor.elements == elements]
    if len(outputs) != 1 or len(whole) != len(table.read(node)) or not 1 <= len(whole) <= 2:
        return None
    return _seconds("add" if len(whole) == 2 else "relu", sizes, len(whole), key)


@functools.lru_cache(maxsize=1 << 14)
def _seconds(op: str, sizes: tuple[int, ...], operands: int, device: _Key) -> Learned | None:
    """Prediction for one kernel, without its launch. Sizes are (B, M, N, K), N the depth, or (B, H)."""
    if min(sizes) < 1:
        return None
    gpu = _gpu(device)
    if gpu is None:
        return None
    import numpy as np

    from .kernel_time import model_file, rows
    from .kernel_time.model import family_model, predict, predict_family

    names = "BMNK" if len(sizes) == 4 else "BH"
    family = rows.family_of(op)
    table = {name: np.array([float(size)]) for name, size in zip(names, sizes, strict=True)}
    asked = rows.Rows(family, device.name, np.array([float(operands)]), table)
    model = model_file.load()
    banded, made = predict(asked, gpu, model), predict_family(asked, gpu, family_model(model, family))
    # the model learned calls of eager PyTorch; a plan's kernels are launched ahead, so the host's part is taken off
    own = 1 - made.call / float(made.core[0])
    return Learned(own * float(banded.seconds[0]), own * float(banded.low[0]), own * float(banded.high[0]))


@functools.lru_cache(maxsize=64)
def _gpu(device: _Key) -> Gpu | None:
    """The published figures of a device by its name; None where there are none, or the device file has others."""
    from ..errors import DeviceError
    from .kernel_time.gpus import find

    try:
        found = find(device.name)
    except DeviceError:
        return None
    alike = all(
        math.isclose(one, other, rel_tol=_SAME)
        for one, other in ((device.bandwidth, found.bandwidth), (device.rate, found.peak))
    )
    return found if alike else None
