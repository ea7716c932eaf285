"""Products whose operands are still in the last cache, because kernels shortly before have read or written them.

What is measured of products has operands out of the near caches, as most of a step's are: weights that were read a
whole step ago, activations from the other end of it. A recurrent layer reads the same weights again within a few
kernels, and adds to the same gradients; its products then take less by the way of their operands from memory, though
never less than their arithmetic by the law of products (``product_cost.py``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..ir.graph import Node
from .devices import Device
from .fusion import Kernel
from .op_classes import kind_of
from .product_cost import laws_of
from .roofline import Cost, bandwidth, gemm_shape, product_seconds
from .storages import StorageTable
from .tensors import TensorTable

#: Part of the last cache that is taken to hold what was touched last: others use it too.
SHARE = 0.25
#: Part of the operands' bytes from which on all of them count as near.
MOST = 0.9


class LastTouched:
    """The values that were touched last, as many as have room in ``capacity`` bytes together."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.held = capacity, 0
        self._values: OrderedDict[int, int] = OrderedDict()

    def __contains__(self, value: int) -> bool:
        return value in self._values

    def touch(self, values: Iterable[tuple[int, int]]) -> None:
        """``values``: with their bytes."""
        for value, size in values:
            self.held += size - self._values.pop(value, 0)
            self._values[value] = size
        while self.held > self.capacity and self._values:
            self.held -= self._values.popitem(last=False)[1]


def with_near_operands(
    kernels: Sequence[Kernel | None],
    costs: Sequence[Cost],
    table: TensorTable,
    storages: StorageTable,
    device: Device,
) -> list[Cost]:
    """``costs`` of ``kernels`` in the order they run, those of products with near operands at what they then take. None
    stands for a kernel of which nothing is known."""
    caches = sorted(device.caches, key=lambda cache: cache.bytes.value)
    if not device.added or not caches:
        return list(costs)
    last = LastTouched(SHARE * caches[-1].bytes.value)
    found = []
    for kernel, cost in zip(kernels, costs, strict=True):
        if kernel is None:
            found.append(cost)
            continue
        sizes = {s: storages.storages[s].bytes for s in (*kernel.reads, *kernel.writes)}
        read = sum(sizes[s] for s in kernel.reads)
        near = sum(sizes[s] for s in kernel.reads if s in last)
        product = next((node for node in kernel.nodes if kind_of(node.op) == "gemm"), None)
        if product is not None and near >= MOST * read:
            saved = _saved(product, read, table, device, caches[-1].bandwidth.value)
            cost = replace(cost, seconds=cost.seconds - saved)
        last.touch(sizes.items())
        found.append(cost)
    return found


def _saved(product: Node, read: int, table: TensorTable, device: Device, rate: float) -> float:
    """Seconds by which a plain f32 product takes less where the ``read`` bytes of its operands come at ``rate``."""
    batch, m, k, n = gemm_shape(product, table)
    law = laws_of(device, "f32").get(device.library or "blas")
    if batch != 1 or law is None or table.of(product.name)[0].dtype != "f32":
        return 0.0
    way = max(0.0, read / bandwidth(read, "memory", device) - read / rate)
    least = 2.0 * m * k * n * law.per_flop
    return min(way, max(0.0, product_seconds(product, "f32", table, device) - least))
