"""Analytic time of kernels that memory bounds: pointwise ops, softmax, layer norm and other reductions over rows.

Time is traffic over bandwidth, tier by tier, beside the arithmetic and the fixed work of each block. A pointwise op
reads and writes each element once. A reduction over rows that do not fit registers sweeps over its row again: from the
caches when the rows in flight on all units fit them, else from device memory. All figures are of the device's
description, none of its name; the few constants are fitted to measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .gpus import Gpu

Array = npt.NDArray[np.float64]

#: Width up to which softmax keeps a row in a warp's registers (PyTorch's persistent softmax kernel).
WARP_ROW = 1024
#: Threads of a layer-norm block (PyTorch's vectorized layer norm: 32 x 4).
NORM_THREADS = 128
#: An element loaded alone costs about as much as this many of a vector of four.
_SINGLE = 2.0


@dataclass(frozen=True)
class MemoryConstants:
    """What is fitted: the share of the host's time of a call that adds to a kernel's; cycles of a lane for each
    element (sums of squares by Welford's update divide; softmax takes exponentials), fewer where a warp keeps the row
    in registers, and of a unit for each block; the useful shares of the last-level and first-level caches and how
    sharply they overflow; the exponent that joins bandwidth and arithmetic."""

    call_share: float = 0.6
    element_cycles: float = 20.0
    warp_cycles: float = 10.0
    block_cycles: float = 300.0
    last_level: float = 0.6
    first_level: float = 0.4
    sharpness: float = 5.0
    exponent: float = 2.5


#: Bounds of the fit, by field, and how far (standard deviation) a field is expected from its default.
BOUNDS: dict[str, tuple[float, float, float]] = {
    "call_share": (0.0, 1.3, 0.3),
    "element_cycles": (0.0, 200.0, 10.0),
    "warp_cycles": (0.0, 200.0, 5.0),
    "block_cycles": (0.0, 2000.0, 200.0),
    "last_level": (0.1, 1.0, 0.2),
    "first_level": (0.0, 1.0, 0.3),
    "sharpness": (2.0, 8.0, 1.5),
    "exponent": (1.2, 8.0, 1.0),
}


@dataclass(frozen=True)
class MemoryTime:
    """Seconds and what they are made of, an entry for each row."""

    seconds: Array
    #: Bytes that must move: inputs once, outputs once.
    least: Array
    #: Bytes of the rows in flight over those of the caches.
    pressure: Array
    waves: Array


def pointwise_time(
    elements: Array, operands: Array, gpu: Gpu, bandwidth_share: float, host: float, constants: MemoryConstants
) -> MemoryTime:
    """Time of an op that reads ``operands`` tensors of ``elements`` f32 elements and writes one."""
    least = 4.0 * elements * (operands + 1)
    seconds = least * _outside(least, gpu) / (gpu.bandwidth * bandwidth_share) + constants.call_share * host
    waves = np.ceil(elements / 512) / (gpu.units * gpu.threads / 128)
    return MemoryTime(seconds, least, least / gpu.l2, waves)


def softmax_time(
    rows: Array, width: Array, gpu: Gpu, bandwidth_share: float, host: float, constants: MemoryConstants
) -> MemoryTime:
    """Softmax over the last dimension: one sweep in registers up to 1024 elements, else three."""
    narrow = width <= WARP_ROW
    threads = softmax_threads(width)
    step = 4 * threads
    # vector loads over whole steps, then single elements
    padded = np.floor(width / step) * step + np.ceil((width % step) / threads) * threads * _SINGLE
    warp = 2.0 ** np.ceil(np.log2(np.maximum(width, 2)))
    return _row_time(
        rows,
        width,
        threads,
        np.where(narrow, 4.0, 1.0),
        np.where(narrow, 4 * warp, padded),
        np.where(narrow, 0.0, 2.0),
        gpu,
        bandwidth_share,
        host,
        constants,
    )


def norm_time(
    rows: Array, width: Array, gpu: Gpu, bandwidth_share: float, host: float, constants: MemoryConstants
) -> MemoryTime:
    """Layer norm over the last dimension: statistics in one sweep, the result in a second."""
    ones = np.ones_like(rows)
    padded = np.ceil(width / (4 * NORM_THREADS)) * 4 * NORM_THREADS
    return _row_time(rows, width, NORM_THREADS * ones, ones, padded, ones, gpu, bandwidth_share, host, constants)


def softmax_threads(width: Array) -> Array:
    """Threads of a block of PyTorch's softmax: four warps of one row each up to 1024 elements; beyond, the power of two
    below a quarter of the row, 512 at most."""
    return np.where(
        width <= WARP_ROW, 128.0, np.clip(2.0 ** np.floor(np.log2(np.maximum(width / 4.0 - 1e-9, 1.0))), 128.0, 512.0)
    )


def _row_time(
    rows: Array,
    width: Array,
    threads: Array,
    rows_of_block: Array,
    padded: Array,
    sweeps: Array,
    gpu: Gpu,
    bandwidth_share: float,
    host: float,
    constants: MemoryConstants,
) -> MemoryTime:
    size = 4.0 * rows * width
    least = 2.0 * size
    resident = np.minimum(np.floor(gpu.threads / threads), 32.0) * gpu.units
    blocks = np.ceil(rows / rows_of_block)
    in_flight = np.minimum(resident, blocks) * rows_of_block * width * 4.0
    # a partition of the cache holds what its units read, so that what all read is held as often as there are partitions
    caches = constants.last_level * gpu.l2 / gpu.l2_partitions + constants.first_level * gpu.units * gpu.l1_kb * 1024
    pressure = in_flight / caches
    miss = 1 - 1 / (1 + pressure**constants.sharpness)
    moved = (least + sweeps * size * miss) * _outside(least, gpu)
    streaming = moved / (gpu.bandwidth * bandwidth_share)
    waves = blocks / resident
    each = np.where(rows_of_block > 1, constants.warp_cycles, constants.element_cycles)
    cycles = np.maximum(blocks / gpu.units, 1.0) * (padded * each / gpu.lanes + constants.block_cycles)
    arithmetic = cycles / (gpu.boost_mhz * 1e6)
    power = constants.exponent
    seconds = (streaming**power + arithmetic**power) ** (1 / power) + constants.call_share * host
    return MemoryTime(seconds, least, pressure, waves)


def _outside(least: Array, gpu: Gpu) -> Array:
    """Share of the traffic that leaves the last-level cache, which keeps small tensors between calls."""
    return 1 - 0.45 / (1 + (least / (0.6 * gpu.l2)) ** 3)
