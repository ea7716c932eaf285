"""Training the kernel-time model from measured rows, and choosing what is free by leaving devices out.

Everything that is chosen (which groups teach, how experts mix, how wide bands are, how far few measurements reach) is
chosen on training rows: a device is left out, the rest predicts it. Rows kept for tests are never read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import KernelDataError
from . import gpus
from .adaptation import Points, Scales, likely, mixed, posterior
from .features import describe
from .fitting import (
    HOST_TIME,
    Group,
    bandwidth_shares,
    fit_core,
    fit_family,
    fit_trees,
    host_seconds,
    row_weights,
    tile_set,
)
from .model import FamilyModel, KernelModel, Mixture, bandwidth_share, libraries, points_of, predict_family
from .power import RATES, boards
from .rows import FAMILIES, GEMM_FAMILIES, Rows, read

Array = npt.NDArray[np.float64]
Log = Callable[[str], None]

#: Family -> the one that is the same arithmetic, and how much slower (median log) it may be beside that one.
_RELATED = {"linear": "bmm"}
_ODD = 0.4
#: From the barest, which only looks at devices of the same chip, to the one that trusts distant devices most.
_MIXTURES = [Mixture(0.3, 0.3), *(Mixture(reach, core) for core in (3.0, 1.0, 0.3) for reach in (0.5, 0.8, 1.2, 2.0))]
#: Weights are chosen on left-out rows longer than this (seconds): they are what predictions are asked for.
_LONG = 1e-3
#: Errors (mean absolute log) below this are alike.
_LEAST_ERROR = 0.02
#: Rows of a left-out device that are looked at.
_MOST_LEFT_OUT = 3000
#: Upper ends (predicted seconds) of the bins that have bands of their own.
BINS = (2e-4, 1e-3, math.inf)
#: 95 % quantiles of Student's t by degrees of freedom.
_STUDENT_95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860}
_SOURCE = "latencies of f32 kernels, PyTorch 2.1: sitar-lab/NeuSight scripts/asplos/data (MIT)"
#: Times that ten rows are drawn from each left-out device to learn how few-shot adaptation behaves.
_DRAWS = 6
_SHOTS = 10


def load_training_rows(folder: Path) -> tuple[list[Group], dict[str, int]]:
    """Rows of ``*.train.csv.gz`` (or ``.csv``) in a folder, a group for each family and device, and rows by file.

    Raises KernelDataError when there are none, DeviceError for a device without published figures.
    """
    files = sorted([*folder.glob("*.train.csv.gz"), *folder.glob("*.train.csv")])
    if not files:
        raise KernelDataError(
            f"no *.train.csv.gz in {folder}", remedy="EFFCC_BENCH_DATA names the folder that holds kernels/"
        )
    collected: dict[tuple[str, str], list[Rows]] = {}
    counts: dict[str, int] = {}
    for file in files:
        table = read(file, measured=True, kernel_names=True)
        counts[file.name] = len(table.lines)
        for rows in table.groups:
            collected.setdefault((rows.family, rows.device), []).append(rows)
    return [(_joined(parts), gpus.find(device)) for (_, device), parts in sorted(collected.items())], counts


def _joined(parts: list[Rows]) -> Rows:
    first = parts[0]
    return Rows(
        first.family,
        first.device,
        np.concatenate([part.operands for part in parts]),
        {name: np.concatenate([part.sizes[name] for part in parts]) for name in first.sizes},
        np.concatenate([part.seconds for part in parts if part.seconds is not None]),
        np.arange(sum(len(part) for part in parts)),
        [name for part in parts for name in part.kernels],
    )


def train_from(folder: Path, seed: int = 0, log: Log = lambda text: None) -> KernelModel:
    """The model trained on ``kernels/*.train.csv*`` of a data folder, with its provenance."""
    kernels = folder / "kernels" if (folder / "kernels").is_dir() else folder
    groups, counts = load_training_rows(kernels)
    model = train(groups, seed, log)
    files = {
        name: {"rows": count, "sha256": hashlib.sha256((kernels / name).read_bytes()).hexdigest()}
        for name, count in counts.items()
    }
    provenance = {
        "source": _SOURCE,
        "rows": sum(counts.values()),
        "files": files,
        "devices": sorted({rows.device for rows, _ in groups}),
        "published_rates": {"boards": len(boards()), "sha256": hashlib.sha256(RATES.read_bytes()).hexdigest()},
        "made_with": {name: importlib.metadata.version(name) for name in ("lightgbm", "scipy", "numpy")},
        "command": "effcc calibrate --from-data",
        **model.provenance,
    }
    return replace(model, provenance=provenance)


def train(
    groups: Sequence[Group], seed: int = 0, log: Log = lambda text: None, unseen: Collection[str] = ()
) -> KernelModel:
    """The model of all families that the groups measure. What else is published of the ``unseen`` devices' rates (names
    as ``gpus.key`` spells them) is not read either."""
    pointwise = [group for group in groups if group[0].family == "pointwise"]
    if not pointwise:
        raise KernelDataError("no rows of pointwise ops", remedy="bandwidth is learned from them: add such a file")
    shares = bandwidth_shares(pointwise)
    families: dict[str, FamilyModel] = {}
    aside: dict[str, list[str]] = {}
    left_out: dict[str, list[_LeftOut]] = {}
    teaching: dict[str, list[Group]] = {}
    for family in FAMILIES:
        own = [group for group in groups if group[0].family == family]
        if not own:
            continue
        related = [group for group in groups if group[0].family == _RELATED.get(family)]
        odd = set_aside(own, related, shares, seed, unseen) if min(len(own), len(related)) >= 3 else []
        used = [group for group in own if group[0].device not in odd]
        left_out[family] = (
            [_leave_out(own, group, pointwise, odd, seed, unseen) for group in used] if len(used) >= 3 else []
        )
        teaching[family] = used
        if odd:
            aside[family] = odd
    mixture = _best_mixture(list(left_out.values()))
    log(f"mixture: {mixture}")
    for family, used in teaching.items():
        runs = left_out[family]
        for run in runs:
            run.predict(mixture)
        others = [group for group in groups if group[0].family == family and group[0].device in aside.get(family, [])]
        fitted = fit_family(family, used, shares, mixture, seed, unseen=unseen, aside=others)
        families[family] = replace(fitted, bands=_bands(fitted, used, runs, seed))
        errors = ", ".join(f"{run.rows.device} {run.error():.1%}" for run in runs)
        log(f"{family}: set aside: {aside.get(family, 'none')}; each device left out: {errors}")
    deviations = {family: _deviations(runs) for family, runs in left_out.items()}
    model = KernelModel(families, deviations, Scales())
    scales = _few_shot_scales(model, left_out, seed, draws=2)
    log(f"few-shot: {scales}")
    by_family = {
        family: _few_shot_scales(model, {family: runs}, seed) for family, runs in left_out.items() if len(runs) >= 3
    }
    for family, each in by_family.items():
        log(f"few-shot, {family}: {each}")
    return replace(model, scales=scales, provenance={"set_aside": aside, "seed": seed}, family_scales=by_family)


def set_aside(
    groups: Sequence[Group],
    related: Sequence[Group],
    shares: dict[str, float],
    seed: int,
    unseen: Collection[str] = (),
) -> list[str]:
    """Devices whose rows of a family contradict both the other devices and their own rows of a related family.

    Linear layers and batched products are the same arithmetic. Each device is left out, and the core that the others
    give is compared with its rows, in both families: where one family is slower than the core by ``_ODD`` more (median
    log) than the other, its rows were measured with another library or under other conditions.
    """
    reference = _excess(related, shares, seed, unseen)
    found = _excess(groups, shares, seed, unseen)
    return [device for device, excess in found.items() if excess - reference.get(device, 0.0) > _ODD]


def _excess(groups: Sequence[Group], shares: dict[str, float], seed: int, unseen: Collection[str]) -> dict[str, float]:
    """Device -> median log of measured time over that of the core fitted to the other devices."""
    found = {}
    for rows, gpu in groups:
        assert rows.seconds is not None
        rest = [group for group in groups if group[0] is not rows]
        constants = fit_core(rest, shares, seed, quick=True, loss="soft_l1", unseen=unseen)
        tiles = tile_set(rows) if rows.family in GEMM_FAMILIES else ()
        made = describe(rows, gpu, constants, bandwidth_share(gpu, shares), host_seconds(rows), tiles)
        found[rows.device] = float(np.median(np.log(rows.seconds / made.seconds)[rows.seconds > HOST_TIME]))
    return found


class _LeftOut:
    """A device's rows, predicted by a model that never saw the device."""

    def __init__(self, rows: Rows, gpu: gpus.Gpu, model: FamilyModel) -> None:
        assert rows.seconds is not None
        # what is tested are kernels, not the host: most measured rows are the shortest
        long = np.flatnonzero(rows.seconds > HOST_TIME)
        if len(long) > _MOST_LEFT_OUT:
            long = np.sort(np.random.default_rng(len(long)).choice(long, _MOST_LEFT_OUT, replace=False))
        self.rows = rows.take(long)
        self.gpu, self.model = gpu, model
        self.said: dict[int, Array] = {}
        self.predict(model.mixture)

    def predict(self, mixture: Mixture) -> None:
        self.model = replace(self.model, mixture=mixture)
        self.prediction = predict_family(self.rows, self.gpu, self.model, said=self.said)
        assert self.rows.seconds is not None
        self.residual = np.log(self.rows.seconds / self.prediction.seconds)

    def error(self) -> float:
        """Mean absolute relative error."""
        return float(np.abs(np.expm1(-self.residual)).mean())


def _leave_out(
    own: Sequence[Group],
    group: Group,
    pointwise: Sequence[Group],
    odd: Sequence[str],
    seed: int,
    unseen: Collection[str],
) -> _LeftOut:
    device = group[0].device
    shares = bandwidth_shares([other for other in pointwise if other[0].device != device])
    rest = [other for other in own if other[0].device != device and other[0].device not in odd]
    hidden = {*unseen, gpus.key(group[1].title)}
    aside = [other for other in own if other[0].device != device and other[0].device in odd]
    model = fit_family(group[0].family, rest, shares, Mixture(), seed, quick=True, unseen=hidden, aside=aside)
    return _LeftOut(*group, model)


def _best_mixture(families: Sequence[Sequence[_LeftOut]]) -> Mixture:
    """One mixture for all families: the barest that is not surely (19 in 20, by Student's t over the left-out devices)
    worse than the best one.

    Likeness of devices is one thing whatever runs on them, and the few devices of a family would choose between so many
    mixtures by chance. A device's families are not independent, so each device counts once: by the mean of the logs of
    its families' errors, so that none decides by being hard to predict."""
    errors: dict[str, list[list[float]]] = {}
    for run in itertools.chain.from_iterable(families):
        found = []
        for mixture in _MIXTURES:
            run.predict(mixture)
            long = run.prediction.core > _LONG
            error = float(np.abs(run.residual[long] if long.sum() >= 50 else run.residual).mean())
            found.append(math.log(max(error, _LEAST_ERROR)))
        errors.setdefault(run.rows.device, []).append(found)
    if len(errors) < 3:
        return Mixture()
    table = np.array([np.mean(found, axis=0) for found in errors.values()])
    worse = table - table[:, [int(table.mean(axis=0).argmin())]]
    doubt = _STUDENT_95[min(len(errors) - 1, len(_STUDENT_95))] * worse.std(axis=0, ddof=1) / math.sqrt(len(errors))
    return _MIXTURES[int(np.flatnonzero(worse.mean(axis=0) <= doubt)[0])]


def _bands(
    model: FamilyModel, groups: Sequence[Group], runs: Sequence[_LeftOut], seed: int
) -> dict[str, list[tuple[float, float, float]]]:
    """5 % and 95 % quantiles of log(measured / predicted), by kind of device and bin of predicted time.

    ``known``: each expert refitted without its longest quarter, which it then predicts, and without every fifth of the
    rest. ``unseen``: devices left out, each counted alike.
    """
    known: list[tuple[Array, Array]] = []
    for rows, gpu in groups:
        assert rows.seconds is not None
        prediction = predict_family(rows, gpu, model)
        target = np.log(rows.seconds / prediction.core)
        order = np.argsort(prediction.core)
        for held in (order[3 * len(order) // 4 :], order[::5]):
            kept = np.setdiff1d(np.arange(len(rows)), held)
            trees = fit_trees(
                prediction.features[kept], target[kept], row_weights(rows.seconds[kept]), seed, quick=True
            )
            known.append((prediction.core[held], target[held] - trees.predict(prediction.features[held])))
    unseen = [(run.prediction.seconds, run.residual) for run in runs]
    bands = {"known": _quantiles(known)}
    bands["unseen"] = _between_devices(unseen) if len(runs) >= 3 else bands["known"]
    return bands


def _between_devices(parts: Sequence[tuple[Array, Array]]) -> list[tuple[float, float, float]]:
    """Band for one more device: its median is drawn as the left-out devices' were (few, hence Student's t), and its
    rows lie about it as theirs about theirs."""
    centred = [(seconds, residual - np.median(residual)) for seconds, residual in parts]
    medians = np.array([np.median(residual) for _, residual in parts])
    count = len(medians)
    reach = _STUDENT_95[min(count - 1, len(_STUDENT_95))] * float(medians.std(ddof=1)) * math.sqrt(1 + 1 / count)
    middle = float(medians.mean())
    return [
        (end, middle - math.hypot(low, reach), middle + math.hypot(high, reach))
        for end, low, high in _quantiles(centred)
    ]


def _quantiles(parts: Sequence[tuple[Array, Array]]) -> list[tuple[float, float, float]]:
    """Weighted quantiles in each bin, each part with the same weight; a thin bin takes the next one's."""
    bins: list[tuple[float, float, float]] = []
    low_end = 0.0
    for end in BINS:
        values, weights = [], []
        for seconds, residual in parts:
            inside = (seconds >= low_end) & (seconds < end)
            if inside.sum() >= 20:
                values.append(residual[inside])
                weights.append(np.full(int(inside.sum()), 1.0 / inside.sum()))
        low_end = end
        if not values:
            continue
        joined, weight = np.concatenate(values), np.concatenate(weights)
        order = np.argsort(joined)
        steps = np.cumsum(weight[order]) / weight.sum()
        low, high = (float(joined[order][min(int(np.searchsorted(steps, q)), len(joined) - 1)]) for q in (0.05, 0.95))
        bins.append((end, low, high))
    return bins


def _deviations(runs: Sequence[_LeftOut]) -> list[float]:
    """Standard deviation of each feature over the left-out rows, which adaptation measures nearness by."""
    if not runs:
        return []
    spread = np.concatenate([run.prediction.features for run in runs]).std(axis=0)
    return [float(f"{max(value, 1e-3):.4g}") for value in spread]


def _ways(run: _LeftOut, model: KernelModel) -> list[tuple[Points, Array]]:
    """The left-out rows and log(measured / predicted) under each library that the device may have."""
    found = []
    for library in libraries(run.gpu, run.model, linear=run.rows.family == "linear"):
        made = predict_family(run.rows, run.gpu, run.model, library)
        assert run.rows.seconds is not None
        left = np.log(run.rows.seconds / made.seconds)
        found.append((points_of(run.rows.family, made.features, model), left))
    return found


def _few_shot_scales(model: KernelModel, left_out: dict[str, list[_LeftOut]], seed: int, draws: int = _DRAWS) -> Scales:
    """Scales of the adaptation that predict left-out devices best after ten of their rows, and its band."""
    runs = [run for family in left_out.values() for run in family]
    if not runs:
        return Scales()
    spread = {
        "family": float(np.sqrt(np.mean([np.median(run.residual) ** 2 for run in runs]))),
        "smooth": float(np.sqrt(np.mean([np.var(run.residual) for run in runs]))),
    }
    generator = np.random.default_rng(seed)
    drawn = []
    for run in runs:
        ways = _ways(run, model)
        for _ in range(draws):
            picked = generator.permutation(len(run.rows))
            few, rest = picked[:_SHOTS], picked[_SHOTS : _SHOTS + 400]
            if len(rest) >= 50:
                drawn.append([(p.take(few), left[few], p.take(rest), left[rest]) for p, left in ways])

    def outcome(scales: Scales) -> list[tuple[Array, Array]]:
        found = []
        for ways in drawn:
            weights = likely(scales, [(seen, residual) for seen, residual, _, _ in ways])
            kept = [way for weight, way in zip(weights, ways, strict=True) if weight > 0]
            parts = [(posterior(scales, *way[:3]), way[3]) for way in kept]
            # what is left of the measured time, under each way
            left = [truth - mean for (mean, _), truth in parts]
            found.append(mixed(weights[weights > 0], left, [deviation for (_, deviation), _ in parts]))
        return found

    def error(scales: Scales) -> float:
        return float(np.mean([np.abs(left).mean() for left, _ in outcome(scales)]))

    grid = [
        Scales(
            device=round(0.3 * spread["family"], 4),
            family=round(spread["family"], 4),
            smooth=round(share * spread["smooth"], 4),
            noise=round(noise * spread["smooth"], 4),
            reach=reach,
        )
        for share, noise, reach in itertools.product((0.6, 1.0), (0.08, 0.15, 0.3, 0.6), (1.0, 2.0, 4.0, 8.0))
    ]
    best = min(grid, key=error)
    ratios = np.concatenate([np.abs(left) / deviation for left, deviation in outcome(best)])
    # one more device than those that the quantile was seen on
    devices = len({run.rows.device for run in runs})
    return replace(best, band=round(float(np.quantile(ratios, 0.9)) * math.sqrt(1 + 1 / devices), 3))
