"""Products whose operands are still in a cache, because kernels shortly before have read or written them.

What compilation times of products has operands and results out of the near caches, as most of a step's are: weights
that were read a whole step ago, activations from the other end of it. A recurrent layer reads the same weights again
within a few kernels, and adds to the same gradients; its products then take no more than the law of products says
(``product_cost.py``), whose results lie where the last ones did, and what is added to them comes at the cache's rate.
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
from .roofline import Cost, bandwidth, gemm_shape, product_parts
from .storages import StorageTable
from .tensors import TensorTable

#: Part of a cache that is taken to hold what was touched last: code and the interpreter's objects lie there too. Part
#: of the last cache, which other processes use as well.
SHARE, LAST_SHARE = 0.75, 0.25
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
    largest = max((cache.bytes.value for cache in device.caches), default=0.0)
    levels = [
        (
            LastTouched((LAST_SHARE if cache.bytes.value == largest else SHARE) * cache.bytes.value),
            cache.bandwidth.value,
        )
        for cache in device.caches
        if cache.bandwidth.value > device.bandwidth  # one that many share may give no more than memory does
    ]
    if not device.added or not levels:
        return list(costs)
    found = []
    for kernel, cost in zip(kernels, costs, strict=True):
        if kernel is None:
            found.append(cost)
            continue
        sizes = {s: storages.storages[s].bytes for s in (*kernel.reads, *kernel.writes)}
        read = sum(sizes[s] for s in kernel.reads)
        product = next((node for node in kernel.nodes if kind_of(node.op) == "gemm"), None)
        if product is not None:
            near = [rate for last, rate in levels if sum(sizes[s] for s in kernel.reads if s in last) >= MOST * read]
            saved = _saved(product, table, device, max(near)) if near else 0.0
            cost = replace(cost, seconds=cost.seconds - saved)
        for last, _ in levels:
            last.touch(sizes.items())
        found.append(cost)
    return found


def _saved(product: Node, table: TensorTable, device: Device, rate: float) -> float:
    """Seconds by which a plain f32 product takes less where its operands, and what is added to it, come at ``rate``."""
    batch, m, k, n = gemm_shape(product, table)
    law = laws_of(device, "f32").get(device.library or "blas")
    if batch != 1 or law is None or table.of(product.name)[0].dtype != "f32":
        return 0.0
    seconds, added = product_parts(product, "f32", table, device)
    saved = max(0.0, seconds - (law.seconds(1, m, k, n) - law.call))
    return saved + max(0.0, added / bandwidth(added, "memory", device) - added / rate) if added else saved
