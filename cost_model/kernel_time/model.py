"""The kernel-time model: an analytic core, experts learned on measured devices, and bands.

Each measured device has an expert for each family: trees that correct the analytic core. A device that was measured
uses its own; another one a mixture, weighted by likeness of the published figures and shrunk to the bare core the less
any is like it. The rate, tile set and experts all follow from figures; names play no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import KernelDataError
from .adaptation import Points, Scales, likely, mixed, posterior
from .core_gemm import TILES, GemmConstants, Tile, sustained_clock
from .core_memory import MemoryConstants
from .features import bandwidth_class, describe, feature_names
from .gpus import Gpu
from .rows import FAMILIES, Rows
from .trees import Trees

Array = npt.NDArray[np.float64]

#: Two sets of figures closer than this are one device.
SAME_DEVICE = 0.05
#: Weight of an unseen device's band in a measured device's own: its rows were measured once, with one library on one
#: host and up to some size, which cross-validation within them cannot tell.
_ANOTHER_DAY = 0.35
#: Experts of less weight than this in all are left alone.
_NO_WEIGHT = 1e-3
#: A device this far from every measured one has an unseen device's band in full.
_FAR = 1.0


@dataclass(frozen=True)
class Expert:
    """What was learned on one measured device: its figures, the seconds that its host takes to call a kernel of the
    family, the tiles that its library uses, the trees that correct the core there."""

    gpu: Gpu
    host: float
    tiles: tuple[Tile, ...] = ()
    trees: Trees | None = None
    #: Share of the boost clock that the device sustained while it was measured; 0 where that is not known.
    clock: float = 0.0


@dataclass(frozen=True)
class Mixture:
    """How experts' predictions (log) are weighed: the reach of likeness, and the weight of the bare core among them."""

    reach: float = 1.0
    core: float = 0.3


@dataclass(frozen=True)
class FamilyModel:
    """The model of one family of kernels."""

    #: Of the core for devices that were not measured; experts correct the one with the ``measured_constants``.
    constants: GemmConstants | MemoryConstants
    experts: tuple[Expert, ...]
    mixture: Mixture
    #: Class of memory -> share of the published bandwidth that streams reach.
    shares: dict[str, float]
    #: ``known`` and ``unseen`` devices -> bins by predicted seconds: upper end, and the 5 % and 95 % quantiles of
    #: log(measured / predicted) in the bin.
    bands: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    measured_constants: GemmConstants | MemoryConstants | None = None


@dataclass(frozen=True)
class Prediction:
    """Seconds of each kernel; the features that adaptation compares rows by; whether the device was measured; the
    seconds within ``core`` that the host's call takes."""

    seconds: Array
    core: Array
    features: Array
    known: bool
    #: Distance to the nearest measured device.
    distance: float
    call: float = 0.0


def likeness_point(gpu: Gpu) -> Array:
    """Where a device lies among others: generation, cache for each unit, arithmetic for each byte, threads, power."""
    return np.array(
        [
            gpu.capability,
            0.5 * math.log2(gpu.l2 / gpu.units),
            0.5 * math.log2(gpu.peak / gpu.bandwidth),
            0.5 * math.log2(gpu.threads),
            math.log2(gpu.lanes_to_issue),
            0.25 * math.log2(gpu.units),
            0.25 * math.log2(gpu.watts or 10.0),
        ]
    )


def distance(one: Gpu, other: Gpu) -> float:
    return float(np.linalg.norm(likeness_point(one) - likeness_point(other)))


@dataclass(frozen=True)
class Library:
    """How a device may run products: the tiles that its library picks from, and whether its units wait for rows of
    linear layers that lie far apart (``core_gemm``)."""

    tiles: tuple[Tile, ...] = ()
    walking: bool = False


def libraries(gpu: Gpu, model: FamilyModel, *, linear: bool = False) -> list[Library]:
    """The ways in which the device may run the family: the one that is expected first, then those of other measured
    devices and each tile alone, then, for ``linear`` layers, measured devices' tiles where far rows are waited for. A
    device that was measured, and kernels without tiles, have one."""
    distances = np.array([distance(gpu, expert.gpu) for expert in model.experts])
    # libraries choose tiles by generation
    generation = np.array([abs(gpu.capability - expert.gpu.capability) for expert in model.experts])
    sets = [model.experts[int(number)].tiles for number in np.lexsort((distances, generation))]
    if not isinstance(model.constants, GemmConstants) or any(distances[i] < SAME_DEVICE for i in _learned(model)):
        return [Library(sets[0])]
    near = list(dict.fromkeys([*sets, *((tile,) for tile in TILES)]))
    waiting = [Library(tiles, walking=True) for tiles in dict.fromkeys(sets)] if linear else []
    return [*(Library(tiles) for tiles in near), *waiting]


def _learned(model: FamilyModel) -> list[int]:
    return [number for number, expert in enumerate(model.experts) if expert.trees is not None]


def blended_clock(measured: float, gpu: Gpu, constants: GemmConstants | MemoryConstants) -> float:
    """Clock (share of the boost clock) to expect of a device that sustained ``measured`` while its rows were taken.

    That was one board in one host, whose cooling is part of the figure; the law of the board's power is of many boards,
    but not of this kind alone. Their geometric mean takes both to be as uncertain."""
    if measured <= 0 or not isinstance(constants, GemmConstants):
        return 0.0
    return math.sqrt(measured * sustained_clock(gpu, constants))


def predict_family(
    rows: Rows,
    gpu: Gpu,
    model: FamilyModel,
    library: Library | None = None,
    said: dict[int, Array] | None = None,
) -> Prediction:
    """Predicted seconds of rows of the model's family on a device, run as expected there or by the given library.
    ``said`` keeps what experts predict, for a caller that mixes them in several ways."""
    share = bandwidth_share(gpu, model.shares)
    distances = np.array([distance(gpu, expert.gpu) for expert in model.experts])
    nearest = model.experts[int(distances.argmin())]
    library = library or libraries(gpu, model)[0]
    tiles, walking = library.tiles, library.walking
    learned = _learned(model)
    own = [number for number in learned if distances[number] < SAME_DEVICE]
    host = nearest.host if own else float(np.median([expert.host for expert in model.experts]))
    corrected = model.measured_constants or model.constants
    constants = corrected if own else model.constants
    clock = blended_clock(model.experts[own[0]].clock, gpu, constants) if own else 0.0
    described = describe(rows, gpu, constants, share, host, tiles, clock, walking)
    if own:
        weights, chosen = np.ones(1), own[:1]
    else:
        raw = np.exp(-0.5 * (distances[learned] / model.mixture.reach) ** 2)
        weights, chosen = raw / (raw.sum() + model.mixture.core), learned
    if weights.max() < _NO_WEIGHT:
        weights = np.zeros_like(weights)
    near = described if own or not weights.any() else describe(rows, gpu, corrected, share, host, tiles, clock, walking)
    core = np.log(described.seconds)
    made = core.copy()
    said = {} if said is None else said
    for weight, number in zip(weights, chosen, strict=True):
        trees = model.experts[number].trees
        if trees is not None and weight > 0:
            if number not in said:
                said[number] = np.log(near.seconds) + trees.predict(near.features)
            made += weight * (said[number] - core)
    call = constants.call_share * host
    least = float(distances[learned].min())
    return Prediction(np.exp(made), described.seconds, described.features, bool(own), least, call)


def bandwidth_share(gpu: Gpu, shares: dict[str, float]) -> float:
    """Share of the published bandwidth that streams reach on this class of device; of a class that was not measured,
    the mean of those that were."""
    kind = bandwidth_class(gpu)
    if kind in shares:
        return shares[kind]
    return float(np.mean(list(shares.values()))) if shares else 0.85


@dataclass(frozen=True)
class KernelModel:
    """All families, the deviations of their features and the scales (for adaptation; of a family, where it has its
    own), and where all of it comes from."""

    families: dict[str, FamilyModel]
    deviations: dict[str, list[float]]
    scales: Scales
    provenance: dict[str, Any] = field(default_factory=dict)
    family_scales: dict[str, Scales] = field(default_factory=dict)

    def scales_of(self, family: str) -> Scales:
        return self.family_scales.get(family, self.scales)


@dataclass(frozen=True)
class Banded:
    """Seconds of kernels and the ends of their 90 % band."""

    seconds: Array
    low: Array
    high: Array


def family_model(model: KernelModel, family: str) -> FamilyModel:
    """The model of a family; raises KernelDataError where the model was trained without it."""
    found = model.families.get(family)
    if found is None:
        raise KernelDataError(
            f"the model has no {family} kernels (it has {', '.join(model.families)})",
            remedy="train it on rows of such ops: effcc calibrate --from-data",
        )
    return found


def nearest_measured(gpu: Gpu, family: FamilyModel) -> tuple[str, bool]:
    """Title of the measured device that is most alike, and whether it is the same device."""
    learned = [expert for expert in family.experts if expert.trees is not None]
    nearest = min(learned, key=lambda expert: distance(gpu, expert.gpu))
    return nearest.gpu.title, distance(gpu, nearest.gpu) < SAME_DEVICE


def predict(rows: Rows, gpu: Gpu, model: KernelModel) -> Banded:
    """Predicted seconds with their band."""
    family = family_model(model, rows.family)
    made = predict_family(rows, gpu, family)
    far = _ANOTHER_DAY + (1 - _ANOTHER_DAY) * min(made.distance / _FAR, 1.0)
    near = _band(made.seconds, family.bands.get("known", []))
    other = _band(made.seconds, family.bands.get("unseen", []))
    low, high = ((1 - far) * one + far * two for one, two in zip(near, other, strict=True))
    return Banded(made.seconds, made.seconds * np.exp(low), made.seconds * np.exp(high))


def _band(seconds: Array, bins: list[tuple[float, float, float]]) -> tuple[Array, Array]:
    low, high = np.zeros_like(seconds), np.zeros_like(seconds)
    for end, below, above in reversed(bins):
        inside = seconds < end
        low, high = np.where(inside, below, low), np.where(inside, above, high)
    return low, high


def points_of(family: str, features: Array, model: KernelModel) -> Points:
    """Rows' features in their deviations, as adaptation compares them."""
    width = max(len(feature_names(name)) for name in FAMILIES)
    padded = np.zeros((len(features), width))
    deviations = model.deviations.get(family)
    if deviations:
        padded[:, : features.shape[1]] = features / np.array(deviations)
    return Points(np.full(len(features), list(FAMILIES).index(family), np.int64), padded)


def adapt(asked: Rows, gpu: Gpu, measured: Sequence[Rows], model: KernelModel) -> Banded:
    """Predicted seconds corrected by measured rows of the same device (of any family); a row that was itself measured
    takes its median measurement."""
    given = [rows for rows in measured if rows.seconds is not None and len(rows) > 0]
    if not given:
        return predict(asked, gpu, model)
    family, scales = family_model(model, asked.family), model.scales_of(asked.family)
    others = [_seen(rows, gpu, model, None) for rows in given if rows.family != asked.family]
    same = [rows for rows in given if rows.family == asked.family]
    known = libraries(gpu, family, linear=asked.family == "linear")
    sets = known if same else known[:1]
    ways = [_joined([*others, *(_seen(rows, gpu, model, library) for rows in same)]) for library in sets]
    weights = likely(scales, ways)
    means, deviations = [], []
    for weight, library, (points, residual) in zip(weights, sets, ways, strict=True):
        if weight > 0:
            made = predict_family(asked, gpu, family, library)
            mean, deviation = posterior(scales, points, residual, points_of(asked.family, made.features, model))
            means.append(np.log(made.seconds) + mean)
            deviations.append(deviation)
    mean, deviation = mixed(weights[weights > 0], means, deviations)
    seconds, width = np.exp(mean), np.exp(scales.band * deviation)
    own = _measurements(asked, measured)
    seconds = np.where(np.isnan(own), seconds, own)
    width = np.where(np.isnan(own), width, np.exp(scales.band * scales.noise))
    return Banded(seconds, seconds / width, seconds * width)


def _seen(rows: Rows, gpu: Gpu, model: KernelModel, library: Library | None) -> tuple[Points, Array]:
    """Measured rows as adaptation sees them, and log(measured / predicted)."""
    made = predict_family(rows, gpu, family_model(model, rows.family), library)
    assert rows.seconds is not None
    return points_of(rows.family, made.features, model), np.log(rows.seconds / made.seconds)


def _joined(parts: Sequence[tuple[Points, Array]]) -> tuple[Points, Array]:
    points = Points(*(np.concatenate([getattr(p, name) for p, _ in parts]) for name in ("family", "features")))
    return points, np.concatenate([residual for _, residual in parts])


def _measurements(asked: Rows, measured: Sequence[Rows]) -> Array:
    """Median seconds measured at exactly the asked sizes, NaN where there are none."""
    found: dict[tuple[float, ...], list[float]] = {}
    for rows in measured:
        if rows.family == asked.family and rows.seconds is not None:
            for key, seconds in zip(_keys(rows), rows.seconds.tolist(), strict=True):
                found.setdefault(key, []).append(seconds)
    return np.array([float(np.median(found[key])) if key in found else math.nan for key in _keys(asked)])


def _keys(rows: Rows) -> list[tuple[float, ...]]:
    columns = [rows.operands, *(rows.sizes[name] for name in sorted(rows.sizes))]
    return [tuple(map(float, row)) for row in np.stack(columns, axis=1)]
