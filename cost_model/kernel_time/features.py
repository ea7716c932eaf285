"""Analytic time and features of kernels: the numbers that the learned residual reads.

Features are ratios and clipped logarithms, saturated where time has become proportional to size, so that what is
learned on small kernels carries over to large ones: beyond the clip the analytic core alone scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import core_memory
from .core_gemm import GemmConstants, Tile, gemm_time
from .core_memory import MemoryConstants, norm_time, pointwise_time, softmax_threads, softmax_time
from .gpus import Gpu
from .rows import GEMM_FAMILIES, Rows

Array = npt.NDArray[np.float64]

GEMM_FEATURES = (
    "log_rows log_depth log_columns compute_over_memory fill edge log_area operands_over_cache right_over_cache "
    "alignment waves edge_128 edge_64 edge_64x128 edge_128x64 edge_32x128 edge_128x32 round_128 round_64 call_share"
).split()
ROW_FEATURES = "block part_step full_steps alignment pressure waves call_share over_cache log_width".split()
POINTWISE_FEATURES = "operands waves call_share over_cache".split()


def feature_names(family: str) -> list[str]:
    if family in GEMM_FAMILIES:
        return list(GEMM_FEATURES)
    return list(POINTWISE_FEATURES if family == "pointwise" else ROW_FEATURES)


@dataclass(frozen=True)
class Described:
    """Analytic seconds and the features, one row a kernel."""

    seconds: Array
    features: Array


def bandwidth_class(gpu: Gpu) -> str:
    """Devices whose memory reaches alike a share of its published bandwidth: stacked memory and graphics memory (which
    server boards run with error correction in line), each with its earlier generations apart."""
    if gpu.memory_kind != "hbm":
        return "gddr" if gpu.capability >= 8 else "gddr_early"
    return "hbm" if gpu.capability >= 7 else "hbm_early"


def describe(
    rows: Rows,
    gpu: Gpu,
    constants: GemmConstants | MemoryConstants,
    bandwidth_share: float,
    host: float,
    tiles: tuple[Tile, ...] = (),
    clock: float = 0.0,
    walking: bool = False,
) -> Described:
    """Analytic time and features of rows of one family on one device, whose host takes ``host`` seconds a call."""
    if isinstance(constants, GemmConstants):
        return _describe_gemm(rows, gpu, constants, bandwidth_share, host, tiles, clock, walking)
    batch, width = rows.sizes["B"], rows.sizes["H"]
    if rows.family == "pointwise":
        time = pointwise_time(batch * width, rows.operands, gpu, bandwidth_share, host, constants)
        columns = [
            rows.operands,
            np.clip(np.log2(time.waves), -3, 5),
            _call_share(time.seconds, host),
            np.clip(np.log2(time.least / gpu.l2), -3, 3),
        ]
        return Described(time.seconds, np.stack(columns, axis=1))
    if rows.family == "softmax":
        time = softmax_time(batch, width, gpu, bandwidth_share, host, constants)
        threads = softmax_threads(width)
        block = np.where(width <= core_memory.WARP_ROW, 0.0, threads)
    else:
        time = norm_time(batch, width, gpu, bandwidth_share, host, constants)
        threads = block = np.full_like(width, float(core_memory.NORM_THREADS))
    steps = width / (4 * threads)
    columns = [
        block,
        steps % 1,
        np.minimum(np.floor(steps), 4.0),
        np.minimum(_alignment(width), 3.0),
        np.clip(np.log2(time.pressure), -3, 1.5),
        np.clip(np.log2(time.waves), -3, 3),
        _call_share(time.seconds, host),
        np.clip(np.log2(time.least / gpu.l2), -2, 2),
        np.minimum(np.log2(width), 12.0),
    ]
    return Described(time.seconds, np.stack(columns, axis=1))


def _describe_gemm(
    rows: Rows,
    gpu: Gpu,
    constants: GemmConstants,
    bandwidth_share: float,
    host: float,
    tiles: tuple[Tile, ...],
    clock: float,
    walking: bool,
) -> Described:
    batch, down, depth, across = (rows.sizes[name] for name in "BMNK")
    walking = walking and rows.family == "linear"
    time = gemm_time(
        batch, down, across, depth, gpu, bandwidth_share, host, tiles, constants, clock=clock, walking=walking
    )

    def edge(tile_rows: float, tile_columns: float) -> Array:
        area = np.ceil(down / tile_rows) * tile_rows * np.ceil(across / tile_columns) * tile_columns
        return np.asarray(down * across / area)

    def rounds(tile: float, resident: float) -> Array:
        waves = batch * np.ceil(down / tile) * np.ceil(across / tile) / (resident * gpu.units)
        return np.where(waves < 16, waves / np.ceil(waves), 1.0)

    waves_128 = batch * np.ceil(down / 128) * np.ceil(across / 128) / gpu.units
    columns = [
        np.clip(np.log2(down), 4, 11),
        np.clip(np.log2(depth), 3, 15),
        np.clip(np.log2(across), 4, 15),
        np.clip(np.log2(time.compute / time.memory), -3, 3),
        time.fill,
        time.edge,
        np.log2(time.area),
        np.clip(np.log2(4 * depth * (down + across) / gpu.l2), -5, 6),
        np.clip(np.log2(4 * depth * across / gpu.l2), -5, 6),
        np.minimum(np.minimum(_alignment(depth), _alignment(across)), 2.0),
        np.clip(np.log2(waves_128), -6, 4),
        edge(128, 128),
        edge(64, 64),
        edge(64, 128),
        edge(128, 64),
        edge(32, 128),
        edge(128, 32),
        rounds(128, 2),
        rounds(64, 4),
        _call_share(time.seconds, host),
    ]
    return Described(time.seconds, np.stack(columns, axis=1))


def _call_share(seconds: Array, host: float) -> Array:
    return np.asarray(np.clip(np.log2(max(host, 1e-6) / seconds), -5, 1))


def _alignment(size: Array) -> Array:
    """Trailing zero bits of a size, up to 5."""
    return sum((np.asarray(size % 2**bits == 0, np.float64) for bits in range(1, 6)), np.zeros_like(size))
