"""Seconds of a rank's kernels: the roofline's, scaled by what was calibrated, and never below the host's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..devices import Device
from ..roofline import bandwidth, gemm_seconds
from .constants import Constants
from .setup import DTYPES
from .work import Work

#: 16-bit operations a second of a unit of the devices that ``Constants.depth`` was calibrated on (A100: 312 TFLOP/s by
#: 108 units).
UNIT_RATE = 312e12 / 108


@dataclass(frozen=True)
class PassTime:
    """Seconds of a stretch of kernels on the device, by what bounds them, and of the host that launches them."""

    compute: float = 0.0
    memory: float = 0.0
    launches: int = 0
    collectives: int = 0

    @property
    def device(self) -> float:
        return self.compute + self.memory

    def __add__(self, other: PassTime) -> PassTime:
        return PassTime(
            self.compute + other.compute, self.memory + other.memory, self.launches + other.launches,
            self.collectives + other.collectives,
        )  # fmt: skip

    def __mul__(self, times: int) -> PassTime:
        return PassTime(self.compute * times, self.memory * times, self.launches * times, self.collectives * times)


def work_time(works: Iterable[Work], dtype: str, device: Device, constants: Constants) -> PassTime:
    """Kernels one after another."""
    compute = memory = 0.0
    launches = 0
    for work in works:
        launches += work.launches
        if work.kind == "memory":
            memory += work.bytes / (bandwidth(int(work.bytes), "pointwise", device) * constants.memory)
            memory += work.launches * device.launch.value
            continue
        products, moved = _product_seconds(work, dtype, device, constants)
        gap = work.launches * device.launch.value
        if products >= moved:
            compute += products + gap
        else:
            memory += moved + gap
    return PassTime(compute, memory, launches)


def _product_seconds(work: Work, dtype: str, device: Device, constants: Constants) -> tuple[float, float]:
    """Seconds of arithmetic and of memory traffic."""
    if work.kind == "fused":
        rate = device.matrix_rate(dtype) * device.efficiency_of("attention") * constants.fused_attention
        return work.flop / rate, 0.0
    share = constants.product if work.kind == "product" else constants.attention_product
    flop = gemm_seconds(work.batch, work.rows, work.depth, work.columns, dtype, device)
    compute = flop * (1 + constants.depth * latency_ratio(dtype, device) / work.depth) / share
    elements = work.rows * work.depth + work.depth * work.columns + work.rows * work.columns
    moved = work.batch * elements * DTYPES[dtype]
    return compute, moved / (bandwidth(moved, "pointwise", device) * constants.memory)


def latency_ratio(dtype: str, device: Device) -> float:
    """By what the depth at which a product reaches half its rate exceeds that of the device it was calibrated on. The
    begin and the end of a tile take the time of memory's latency, which has stayed the same, while a unit's rate has
    grown: the same time is a greater depth."""
    if device.kind not in ("cuda", "rocm") or dtype == "f32":
        return 1.0
    return device.matrix_rate(dtype) / max(1.0, device.units.value) / UNIT_RATE


def wall(device: float, host: float, constants: Constants) -> float:
    """Seconds of a stretch that the device takes ``device`` for and the host ``host``: the longer, or somewhat more
    where they are alike, since neither is ahead all the time."""
    most = max(device, host)
    if most <= 0:
        return 0.0
    power = constants.exponent
    return float(most * ((device / most) ** power + (host / most) ** power) ** (1 / power))
