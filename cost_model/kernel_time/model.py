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
from .adaptation import Points, Scales, posterior
from .core_gemm import GemmConstants, Tile
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


@dataclass(frozen=True)
class Mixture:
    """How experts are weighed: the reach of likeness, and the weight of the bare core among them."""

    reach: float = 1.0
    core: float = 0.3


@dataclass(frozen=True)
class FamilyModel:
    """The model of one family of kernels."""

    constants: GemmConstants | MemoryConstants
    experts: tuple[Expert, ...]
    mixture: Mixture
    #: Class of memory -> share of the published bandwidth that streams reach.
    shares: dict[str, float]
    #: ``known`` and ``unseen`` devices -> bins by predicted seconds: upper end, and the 5 % and 95 % quantiles of
    #: log(measured / predicted) in the bin.
    bands: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)


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
    """Where a device lies among others: generation, cache for each unit, arithmetic for each byte, threads, clocks."""
    return np.array(
        [
            gpu.capability,
            0.5 * math.log2(gpu.l2 / gpu.units),
            0.5 * math.log2(gpu.peak / gpu.bandwidth),
            0.5 * math.log2(gpu.threads),
            math.log2(gpu.lanes_to_issue),
            0.25 * math.log2(gpu.units),
            0.5 * math.log2(gpu.clock_ratio),
        ]
    )


def distance(one: Gpu, other: Gpu) -> float:
    return float(np.linalg.norm(likeness_point(one) - likeness_point(other)))


def predict_family(rows: Rows, gpu: Gpu, model: FamilyModel) -> Prediction:
    """Predicted seconds of rows of the model's family on a device."""
    share = bandwidth_share(gpu, model.shares)
    distances = np.array([distance(gpu, expert.gpu) for expert in model.experts])
    nearest = model.experts[int(distances.argmin())]
    # libraries choose tiles by generation
    generation = np.array([abs(gpu.capability - expert.gpu.capability) for expert in model.experts])
    tiles = model.experts[int(np.lexsort((distances, generation))[0])].tiles
    learned = [number for number, expert in enumerate(model.experts) if expert.trees is not None]
    own = [number for number in learned if distances[number] < SAME_DEVICE]
    host = nearest.host if own else float(np.median([expert.host for expert in model.experts]))
    described = describe(rows, gpu, model.constants, share, host, tiles)
    if own:
        weights, chosen = np.ones(1), own[:1]
    else:
        raw = np.exp(-0.5 * (distances[learned] / model.mixture.reach) ** 2)
        weights, chosen = raw / (raw.sum() + model.mixture.core), learned
    correction = np.zeros(len(rows))
    for weight, number in zip(weights, chosen, strict=True):
        trees = model.experts[number].trees
        if trees is not None and weight > 1e-3:
            correction += weight * trees.predict(described.features)
    seconds = described.seconds * np.exp(correction)
    call = model.constants.call_share * host
    return Prediction(seconds, described.seconds, described.features, bool(own), float(distances[learned].min()), call)


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
    seen, residuals = [], []
    for rows in measured:
        if rows.seconds is None or len(rows) == 0:
            continue
        made = predict_family(rows, gpu, family_model(model, rows.family))
        seen.append(points_of(rows.family, made.features, model))
        residuals.append(np.log(rows.seconds / made.seconds))
    if not seen:
        return predict(asked, gpu, model)
    points = Points(np.concatenate([p.family for p in seen]), np.concatenate([p.features for p in seen]))
    made = predict_family(asked, gpu, family_model(model, asked.family))
    scales = model.scales_of(asked.family)
    mean, deviation = posterior(
        scales, points, np.concatenate(residuals), points_of(asked.family, made.features, model)
    )
    seconds = made.seconds * np.exp(mean)
    width = np.exp(scales.band * deviation)
    own = _measurements(asked, measured)
    seconds = np.where(np.isnan(own), seconds, own)
    width = np.where(np.isnan(own), width, np.exp(scales.band * scales.noise))
    return Banded(seconds, seconds / width, seconds * width)


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
