"""Analytic time of an f32 matrix product on a GPU: tiles, waves, occupancy, pipes and the memory tiers.

A product is cut into tiles of (rows x columns) of the result, each computed by one thread block over the whole depth.
The tiles are dealt to the units; the unit with the most decides. Their arithmetic runs at the rate that issue slots
leave to multiply-adds, and at the clock that the board's power sustains (short kernels at the boost clock). The memory
traffic counts how often a wave of resident tiles has to read the operands again, and whether the last-level cache still
holds them. All figures are of the device's description, none of its name; the few constants are fitted to measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from .gpus import Gpu
from .power import clock_share

Array = npt.NDArray[np.float64]
#: Rows and columns of the result that a thread block computes.
Tile = tuple[int, int]

#: Tile -> threads of the block and registers a thread: those of the public f32 kernels.
TILES: dict[Tile, tuple[int, int]] = {
    (128, 128): (256, 122),
    (64, 128): (128, 122),
    (128, 64): (128, 122),
    (64, 64): (64, 126),
    (32, 128): (64, 110),
    (128, 32): (64, 110),
    (32, 64): (128, 86),
    (64, 32): (128, 86),
    (32, 32): (128, 86),
}
#: Registers of one unit (all CUDA devices of capability 5.0 and later).
REGISTERS = 65536
#: Bytes of memory whose translations a unit has at hand, and its cycles for a row of a tile that lies beyond them.
_REACH = 64.0 * 2**20
_WALK_CYCLES = 6.0


@dataclass(frozen=True)
class GemmConstants:
    """What is fitted to rows: milliseconds after which the power limit has pulled the clock half down and how sharply,
    the shares of the pipe that tiles of each size reach, threads in flight that hide half of the latency, seconds
    (1e-6) of a round of blocks, the share of the host's time of a call that adds to a kernel's, the cache's useful
    share, the exponent that joins arithmetic and memory time, and what counted traffic is multiplied by. And to
    published rates of other boards (``power.py``): the share of issue slots left to multiply-adds where lanes take one
    instruction each cycle, and what the power limit leaves of the clock."""

    burst_ms: float = 6.0
    burst_power: float = 1.0
    pipe_large: float = 0.98
    pipe_middle: float = 0.92
    pipe_narrow: float = 0.85
    pipe_small: float = 0.65
    hiding: float = 30.0
    round_us: float = 1.0
    call_share: float = 0.6
    cache: float = 0.6
    exponent: float = 3.0
    traffic: float = 1.0
    single_issue: float = 0.84
    power_exponent: float = 0.8
    watts_5: float = 6.4
    watts_7: float = 8.7
    watts_8: float = 9.8
    watts_14: float = 16.7


#: Bounds of the fit, by field, and how far (standard deviation) a field is expected from its default.
BOUNDS: dict[str, tuple[float, float, float]] = {
    "burst_ms": (0.1, 100.0, 3.0),
    "burst_power": (0.3, 3.0, 0.5),
    "pipe_large": (0.9, 1.0, 0.03),
    "pipe_middle": (0.5, 1.0, 0.06),
    "pipe_narrow": (0.4, 1.0, 0.08),
    "pipe_small": (0.3, 1.0, 0.15),
    "hiding": (0.0, 300.0, 20.0),
    "round_us": (0.0, 10.0, 1.0),
    "call_share": (0.0, 1.3, 0.3),
    "cache": (0.3, 1.0, 0.2),
    "exponent": (1.5, 8.0, 1.0),
    "traffic": (0.8, 1.25, 0.1),
}


@dataclass(frozen=True)
class GemmTime:
    """Seconds and what they are made of, an entry for each row."""

    seconds: Array
    compute: Array
    memory: Array
    tiles: Array
    fill: Array
    edge: Array
    area: Array
    traffic: Array
    #: Share (of the log) of the power limit's effect on the clock that acts within the kernel.
    held: Array


def sustained_clock(gpu: Gpu, constants: GemmConstants) -> float:
    """Share of the boost clock that the board's power sustains under dense arithmetic."""
    needed = np.array([constants.watts_5, constants.watts_7, constants.watts_8, constants.watts_14])
    return clock_share(gpu.watts, gpu.process_nm, needed, constants.power_exponent)


def boost_rate(gpu: Gpu, constants: GemmConstants) -> float:
    """f32 operations a second that issue slots leave to dense arithmetic at the boost clock, on the whole device."""
    return gpu.peak * min(1.0, constants.single_issue / gpu.lanes_to_issue)


def gemm_time(
    batch: Array,
    rows: Array,
    columns: Array,
    depth: Array,
    gpu: Gpu,
    bandwidth_share: float,
    host: float,
    tiles: tuple[Tile, ...],
    constants: GemmConstants,
    *,
    clock: float = 0.0,
    walking: bool = False,
) -> GemmTime:
    """Time of ``batch`` products (rows x depth) @ (depth x columns) with the fastest of the ``tiles`` that the library
    uses on such devices; ``host`` is the seconds that the host takes to call it. ``clock``: the sustained share of
    the boost clock, where it is known better than the board's power tells. ``walking``: rows far apart are waited for
    (``_walks``)."""
    best: GemmTime | None = None
    clock = clock or sustained_clock(gpu, constants)
    for tile in tiles:
        made = _with_tile(batch, rows, columns, depth, gpu, bandwidth_share, tile, constants, clock, walking)
        if best is None:
            best = made
            continue
        faster = made.seconds < best.seconds
        best = GemmTime(*(np.where(faster, getattr(made, f.name), getattr(best, f.name)) for f in fields(GemmTime)))
    assert best is not None
    return replace(best, seconds=best.seconds + constants.call_share * host)


def _pipe(tile: Tile, constants: GemmConstants) -> float:
    area = tile[0] * tile[1]
    if area >= 8192:
        return constants.pipe_large
    if area == 4096:
        return constants.pipe_middle if tile[0] == tile[1] else constants.pipe_narrow
    return constants.pipe_small


def _with_tile(
    batch: Array,
    rows: Array,
    columns: Array,
    depth: Array,
    gpu: Gpu,
    bandwidth_share: float,
    tile: Tile,
    constants: GemmConstants,
    clock: float,
    walking: bool,
) -> GemmTime:
    tile_rows, tile_columns = tile
    threads, registers = TILES[tile]
    across, down = np.ceil(columns / tile_columns), np.ceil(rows / tile_rows)
    tiles = batch * across * down
    resident = max(1.0, min(gpu.threads // threads, REGISTERS // (threads * registers)))
    each = np.ceil(tiles / gpu.units)
    in_flight = np.minimum(each, resident) * threads
    rate = boost_rate(gpu, constants) / gpu.units * _pipe(tile, constants)
    work = 2.0 * tile_rows * tile_columns * np.ceil(depth / 8) * 8
    compute = each * work * (1 + constants.hiding / in_flight) / rate
    # the power limit takes a while to pull the clock down: measurements of short kernels are over before
    held = 1 / (1 + (constants.burst_ms * 1e-3 / compute) ** constants.burst_power)
    compute = compute * clock**-held
    compute = compute + constants.round_us * 1e-6 * np.ceil(each / resident)
    if walking:
        compute = compute + each * _walks(tile, depth, np.minimum(each, resident), gpu)
    # a wave of resident tiles runs along the columns first; operands are read once for a wave
    wave = np.minimum(resident * gpu.units, tiles)
    bands_across = np.maximum(1.0, across / wave)
    bands_down = np.maximum(1.0, down / np.maximum(1.0, wave / across))
    useful = constants.cache * gpu.l2
    left, right = 4.0 * rows * depth, 4.0 * columns * depth
    again_left = (bands_across - 1) * _missing(4.0 * tile_rows * depth / useful)
    again_right = (bands_down - 1) * _missing(right / useful)
    traffic = batch * (left * (1 + again_left) + right * (1 + again_right) + 4.0 * rows * columns)
    memory = constants.traffic * traffic / (gpu.bandwidth * bandwidth_share)
    power = constants.exponent
    seconds = (compute**power + memory**power) ** (1 / power)
    fill = tiles / (each * gpu.units)
    edge = (rows * columns) / (across * tile_columns * down * tile_rows)
    area = np.full_like(tiles, float(tile_rows * tile_columns))
    return GemmTime(seconds, compute, memory, tiles, fill, edge, area, traffic, held)


def _walks(tile: Tile, depth: Array, resident: Array, gpu: Gpu) -> Array:
    """Seconds that a tile of a linear layer waits where a unit's translations of addresses reach no further than its
    tiles' rows: both operands are contiguous along the depth, so each step along it touches every row of the tile, and
    rows far apart lie in pages of their own. Seen on the P100 (half of its speed is lost where rows are 64 KiB apart)
    and, if less, on the P4, not on later devices."""
    touched = float(sum(tile))
    missing = _missing(4.0 * depth * touched * resident / _REACH)
    return touched * np.ceil(depth / 8) * _WALK_CYCLES / (gpu.boost_mhz * 1e6) * missing


def _missing(size: Array) -> Array:
    """Share that the cache no longer holds, of a working set of ``size`` caches."""
    return size**2 / (1 + size**2)
