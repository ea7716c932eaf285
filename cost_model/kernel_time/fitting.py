"""Fitting the kernel-time model to measured rows: constants by robust least squares, experts by boosted trees.

Needs scipy and LightGBM (the extra ``train``); predicting needs neither.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ...errors import MissingExtraError
from . import core_gemm, core_memory
from .core_gemm import TILES, GemmConstants, Tile, gemm_time, sustained_clock
from .core_memory import MemoryConstants
from .features import bandwidth_class, describe
from .gpus import Gpu
from .model import Expert, FamilyModel, Mixture, bandwidth_share
from .power import fit_power
from .rows import GEMM_FAMILIES, Rows
from .trees import Trees, from_lightgbm

Array = npt.NDArray[np.float64]
Constants = TypeVar("Constants", GemmConstants, MemoryConstants)
#: Rows of one device that constants are fitted to; they are few, and every evaluation is of all rows.
_FIT_ROWS = 1500
_QUICK_ROWS = 400
#: Trees of an expert, and of one that only serves to choose.
_ROUNDS = 120
_QUICK_ROUNDS = 60
_QUICK_TREE_ROWS = 6000
#: Rows shorter than this (seconds) are the host's time, not the kernel's.
HOST_TIME = 1.2e-4
#: Rows of this length (seconds) have weight 1; shorter ones less, longer ones more.
_UNIT_WEIGHT = 3e-4
#: Share of a device's median misfit that is laid to the device (its cooling, its library's build), not the constants.
_LEVEL = 0.8
#: Defaults count as this many rows for each row of a device, a standard deviation as an error of so much (log).
_PRIOR_ROWS = 0.15
_PRIOR_STEP = 0.05
#: Share of a device's rows below which a tile is no part of its library's set.
_TILE_SHARE = 0.02
#: Rows that tell the clock: the power limit acts for most of them, arithmetic takes this much longer than memory, and
#: there are this many.
_HELD = 0.5
_BOUND = 2.0
_FEW = 50


def extra(module: str) -> Any:
    """An optional module; raises MissingExtraError naming the extra."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"training the kernel-time model needs {module.split('.')[0]}",
            remedy="pip install 'effcc[train]'",
        ) from error


Group = tuple[Rows, Gpu]


def bandwidth_shares(groups: Sequence[Group]) -> dict[str, float]:
    """Class of memory -> share of the bandwidth that long pointwise kernels reach, the mean over measured devices."""
    found: dict[str, list[float]] = {}
    for rows, gpu in groups:
        assert rows.seconds is not None
        moved = 4.0 * rows.sizes["B"] * rows.sizes["H"] * (rows.operands + 1)
        far = moved > max(4 * gpu.l2, 3e7)
        if far.sum() < 20:
            continue
        # seconds = call + bytes / bandwidth: the slope, robustly, from the longest against the shorter half
        order = np.argsort(moved[far])
        x, y = moved[far][order], rows.seconds[far][order]
        half = len(x) // 2
        slopes = (y[half:, None] - y[None, :half]) / np.maximum(x[half:, None] - x[None, :half], 1e5)
        found.setdefault(bandwidth_class(gpu), []).append(float(1 / (np.median(slopes) * gpu.bandwidth)))
    return {kind: float(np.mean(values)) for kind, values in sorted(found.items())}


def host_seconds(rows: Rows) -> float:
    """Seconds that the host takes to call a kernel of the family: what the shortest kernels take."""
    assert rows.seconds is not None
    return float(f"{np.quantile(rows.seconds, 0.02):.4g}")


def tile_set(rows: Rows) -> tuple[Tile, ...]:
    """The tiles that a device's library used in the measured rows, by the recorded kernels' names."""
    counts: Counter[Tile] = Counter()
    for name in rows.kernels:
        match = re.search(r"sgemm_(\d+)x(\d+)", name)
        if match:
            counts[int(match[2]), int(match[1])] += 1
    total = sum(counts.values())
    return tuple(sorted(tile for tile, count in counts.items() if tile in TILES and count > _TILE_SHARE * total))


def fit_constants(
    start: Constants,
    bounds: dict[str, tuple[float, float, float]],
    groups: Sequence[Group],
    shares: dict[str, float],
    tiles: Sequence[tuple[Tile, ...]],
    hosts: Sequence[float],
    seed: int,
    most: int,
    loss: str = "cauchy",
    *,
    carry_over: bool = True,
    clocks: Sequence[float] = (),
) -> Constants:
    """The constants that fit the groups' rows best, in log seconds with a robust loss. If they are to ``carry_over`` to
    other devices, then not far from their start, and devices' own levels hardly move them."""
    optimize = extra("scipy.optimize")
    generator = np.random.default_rng(seed)
    samples: list[tuple[Rows, Gpu, float, tuple[Tile, ...], float, float, Array, Array]] = []
    for (rows, gpu), tile, host, clock in zip(groups, tiles, hosts, clocks or [0.0] * len(groups), strict=True):
        assert rows.seconds is not None
        long = np.flatnonzero(rows.seconds > HOST_TIME)
        if len(long) > most:
            long = np.sort(generator.choice(long, most, replace=False))
        if len(long) == 0:
            continue
        picked = rows.take(long)
        assert picked.seconds is not None
        weight = np.sqrt(np.minimum(picked.seconds / 5e-4, 6.0) / len(long))
        samples.append((picked, gpu, host, tile, bandwidth_share(gpu, shares), clock, np.log(picked.seconds), weight))
    names = list(bounds)
    first = np.array([asdict(start)[name] for name in names])
    low, high, spread = (np.array([bounds[name][place] for name in names]) for place in (0, 1, 2))

    def residuals(values: Array) -> Array:
        constants = replace(start, **dict(zip(names, map(float, values), strict=True)))
        parts = [np.repeat(_PRIOR_STEP * (values - first) / spread, int(_PRIOR_ROWS * most * carry_over))]
        for rows, gpu, host, tile, share, clock, log, weight in samples:
            off = np.log(describe(rows, gpu, constants, share, host, tile, clock).seconds) - log
            parts.append((off - _LEVEL * carry_over * np.median(off)) * weight * np.sqrt(most))
        return np.asarray(np.concatenate(parts))

    answer = optimize.least_squares(
        residuals,
        first,
        bounds=(low, high),
        loss=loss,
        f_scale=0.1,
        x_scale=np.maximum(np.abs(first), 0.1),
        ftol=1e-4,
        xtol=1e-4,
        max_nfev=40,
    )
    return replace(start, **{name: float(f"{value:.4g}") for name, value in zip(names, answer.x, strict=True)})


def row_weights(seconds: Array) -> Array:
    return np.asarray(np.clip(seconds / _UNIT_WEIGHT, 0.03, 5.0))


def fit_trees(features: Array, target: Array, weight: Array, seed: int, *, quick: bool = False) -> Trees:
    """Boosted trees for ``target``, with the absolute error as loss."""
    lightgbm = extra("lightgbm")
    parameters = {
        "objective": "l1",
        "learning_rate": 0.08,
        "num_leaves": 15,
        "min_data_in_leaf": 20,
        "lambda_l2": 1.0,
        "feature_fraction": 0.7,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "max_bin": 127,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "verbose": -1,
        "seed": seed,
    }
    rounds = _QUICK_ROUNDS if quick else _ROUNDS
    if quick and len(target) > _QUICK_TREE_ROWS:
        kept = np.random.default_rng(seed).choice(len(target), _QUICK_TREE_ROWS, replace=False)
        features, target, weight = features[kept], target[kept], weight[kept]
    booster = lightgbm.train(parameters, lightgbm.Dataset(features, target, weight=weight), rounds)
    return from_lightgbm(booster.dump_model())


def fit_core(
    groups: Sequence[Group],
    shares: dict[str, float],
    seed: int,
    *,
    quick: bool = False,
    loss: str = "cauchy",
    unseen: Collection[str] = (),
    carry_over: bool = True,
    clocks: Sequence[float] = (),
) -> GemmConstants | MemoryConstants:
    """The constants of a family's analytic core; ``loss`` is one of scipy's, the default hardly moved by outliers.
    Published rates of the ``unseen`` devices (their names as ``gpus.key`` spells them) are not read either."""
    family = groups[0][0].family
    gemm = family in GEMM_FAMILIES
    tiles = [tile_set(rows) if gemm else () for rows, _ in groups]
    hosts = [host_seconds(rows) for rows, _ in groups]
    most = _QUICK_ROWS if quick else _FIT_ROWS
    if gemm:
        products = GemmConstants(**fit_power(unseen, extra("scipy.optimize")))
        limits = core_gemm.BOUNDS
        return fit_constants(
            products, limits, groups, shares, tiles, hosts, seed, most, loss, carry_over=carry_over, clocks=clocks
        )
    bounds = dict(core_memory.BOUNDS)
    if family == "pointwise":
        bounds = {"call_share": bounds["call_share"]}
    start = MemoryConstants()
    return fit_constants(start, bounds, groups, shares, tiles, hosts, seed, most, loss, carry_over=carry_over)


def fit_family(
    family: str,
    groups: Sequence[Group],
    shares: dict[str, float],
    mixture: Mixture,
    seed: int,
    *,
    quick: bool = False,
    unseen: Collection[str] = (),
    aside: Sequence[Group] = (),
) -> FamilyModel:
    """The model of a family from its measured groups, without bands; nothing of the ``unseen`` devices is read. Of the
    groups set ``aside`` only the tiles that their kernels are named after are."""
    constants = fit_core(groups, shares, seed, quick=quick, unseen=unseen)
    clocks = measured_clocks(groups, shares, constants)
    measured = fit_core(groups, shares, seed, quick=quick, unseen=unseen, carry_over=False, clocks=clocks)
    experts = []
    for (rows, gpu), clock in zip(groups, clocks, strict=True):
        assert rows.seconds is not None
        tiles = tile_set(rows) if family in GEMM_FAMILIES else ()
        host = host_seconds(rows)
        described = describe(rows, gpu, measured, bandwidth_share(gpu, shares), host, tiles, clock)
        target = np.log(rows.seconds / described.seconds)
        trees = fit_trees(described.features, target, row_weights(rows.seconds), seed, quick=quick)
        experts.append(Expert(gpu, host, tiles, trees, clock))
    for rows, gpu in aside:
        experts.append(Expert(gpu, host_seconds(rows), tile_set(rows) if family in GEMM_FAMILIES else ()))
    return FamilyModel(constants, tuple(experts), mixture, shares, measured_constants=measured)


def measured_clocks(
    groups: Sequence[Group], shares: dict[str, float], constants: GemmConstants | MemoryConstants
) -> list[float]:
    """Share of the boost clock that each device sustained while its rows were measured: what its long products that
    arithmetic bounds say beyond the core. It may lie below what the power law says by as much again (log): where power
    hardly binds, rows are slow for another reason. 0 (not known) where there are few, and where kernels are no
    products."""
    if not isinstance(constants, GemmConstants):
        return [0.0] * len(groups)
    found = []
    for rows, gpu in groups:
        assert rows.seconds is not None
        batch, down, depth, across = (rows.sizes[name] for name in "BMNK")
        law = clock = sustained_clock(gpu, constants)
        for _ in range(3):
            time = gemm_time(
                batch,
                down,
                across,
                depth,
                gpu,
                bandwidth_share(gpu, shares),
                host_seconds(rows),
                tile_set(rows),
                constants,
                clock=clock,
            )
            long = (time.held > _HELD) & (time.compute > _BOUND * time.memory)
            if long.sum() < _FEW:
                clock = 0.0
                break
            slower = np.log(rows.seconds / time.seconds)[long] / time.held[long]
            clock = min(max(clock * math.exp(-float(np.median(slower))), law**2), 1.0)
        found.append(float(f"{clock:.4g}"))
    return found
