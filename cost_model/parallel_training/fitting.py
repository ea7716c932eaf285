"""Calibration of the constants on measured training steps, from data to file.

Least squares of the log of predicted over measured, robust against rows far out. Every fourth row of each file (by its
line) is kept for validation: no constant sees it, and the band is taken from how those rows come out; for devices that
were not measured from how one cluster's rows come out when the constants are of the other's alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ...errors import KernelDataError
from ..devices import Device, Figure, load_device
from .constants import BOUNDS, Calibration, Constants
from .rows import MeasuredStep, read
from .step import predict_step

Array = npt.NDArray[np.float64]
Log = Callable[[str], None]

#: A row in so many is for validation.
VALIDATION = 4
#: Residuals (of the log) beyond this count less.
_ROBUST = 0.06
_SOURCE = "vTrain (Bang et al., MICRO 2024), data/ground_truth_*.csv: measured with Megatron-DeepSpeed on A100"


@dataclass(frozen=True)
class Cluster:
    """A file of rows: the device they ran on, what they recomputed, how much each row counts."""

    file: str
    recompute: str
    weight: float
    device: Callable[[], Device]
    about: str


def _single() -> Device:
    """One node of eight A100 with 40 GB."""
    device = load_device("a100-80g")
    memory = device.tiers["device"]
    source = "NVIDIA A100 40GB datasheet (SXM: 1,555 GB/s)"
    tier = msgspec.structs.replace(
        memory,
        bandwidth=Figure(value=1.555e12, source=source),
        capacity=Figure(value=float(40 * 2**30), source=source),
    )
    return msgspec.structs.replace(device, name="a100-40g", tiers=device.tiers | {"device": tier})


def _multi() -> Device:
    """Nodes of eight A100 with 800 Gb/s between them."""
    device = load_device("a100-80g")
    figure = Figure(value=100e9 / 8, source="vTrain's configurations: inter_node_bandwidth 800 Gb/s, node_size 8")
    links = tuple(
        msgspec.structs.replace(link, bandwidth=figure) if link.scope == "cluster" else link for link in device.links
    )
    return msgspec.structs.replace(device, links=links)


CLUSTERS = (
    Cluster(
        "vtrain_single_given.csv", "none", 1.0, _single,
        "one node; assumed: boards of 40 GB (the training rows fit better) "
        "and nothing recomputed (their times leave no room)",
    ),
    Cluster(
        "vtrain_multi_given.csv", "full", 3.0, _multi,
        "800 Gb/s between nodes, every layer recomputed (vTrain's configurations)",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A measured row with the device that it ran on."""

    row: MeasuredStep
    device: Device
    weight: float
    cluster: str

    @property
    def validates(self) -> bool:
        return self.row.line % VALIDATION == 0


def load_samples(folder: Path) -> list[Sample]:
    """All rows of a data folder's ``clusters/``. Raises KernelDataError when there is none."""
    clusters = folder / "clusters" if (folder / "clusters").is_dir() else folder
    found = []
    for cluster in CLUSTERS:
        if (clusters / cluster.file).is_file():
            device = cluster.device()
            rows = read(clusters / cluster.file, cluster.recompute)
            found += [Sample(row, device, cluster.weight, cluster.file) for row in rows]
    if not found:
        names = ", ".join(cluster.file for cluster in CLUSTERS)
        raise KernelDataError(f"no measured training steps in {clusters}", remedy=f"it should hold {names}")
    return found


def log_ratios(samples: Sequence[Sample], constants: Constants) -> Array:
    """Log of predicted over measured seconds."""
    calibration = Calibration(constants)
    return np.array(
        [math.log(predict_step(each.row.training, each.device, calibration).seconds / each.row.seconds)
         for each in samples]
    )  # fmt: skip


def fit(samples: Sequence[Sample], start: Constants | None = None) -> Constants:
    """The constants that fit these rows best within their bounds."""
    from scipy.optimize import least_squares

    names = list(BOUNDS)
    low, high = (np.array([BOUNDS[name][side] for name in names]) for side in (0, 1))
    begin = start or Constants()
    first = (np.array([getattr(begin, name) for name in names]) - low) / (high - low)
    weights = np.array([each.weight for each in samples])

    def made(point: Array) -> Constants:
        values = (low + point * (high - low)).tolist()
        return replace(begin, **dict(zip(names, values, strict=True)))

    def residuals(point: Array) -> Array:
        return np.asarray(weights * log_ratios(samples, made(point)))

    found = least_squares(
        residuals, np.clip(first, 1e-6, 1 - 1e-6), bounds=(0.0, 1.0), loss="soft_l1", f_scale=_ROBUST, diff_step=1e-4,
        max_nfev=40,
    )  # fmt: skip
    return made(found.x)


def errors(samples: Sequence[Sample], constants: Constants) -> dict[str, Any]:
    """Rows, mean and 90 % quantile of the absolute relative error (percent) of each cluster."""
    found: dict[str, Any] = {}
    for cluster in dict.fromkeys(each.cluster for each in samples):
        own = [each for each in samples if each.cluster == cluster]
        error = 100 * np.abs(np.exp(log_ratios(own, constants)) - 1)
        found[cluster] = {
            "rows": len(own),
            "error_percent": round(float(error.mean()), 2),
            "p90_percent": round(float(np.quantile(error, 0.9)), 2),
        }
    return found


def _width(samples: Sequence[Sample], constants: Constants) -> float:
    """Half-width of the band that holds nine rows in ten. Which way rows of one cluster lie says nothing of the next
    cluster, so the band is as wide on both sides."""
    return round(float(np.quantile(np.abs(log_ratios(samples, constants)), 0.9)), 3)


def calibrate_from(folder: Path, log: Log = lambda text: None) -> Calibration:
    """The calibration on the training rows of ``clusters/*_given.csv``, with band and provenance."""
    samples = load_samples(folder)
    training = [each for each in samples if not each.validates]
    held = [each for each in samples if each.validates]
    log(f"fit {len(BOUNDS)} constants to {len(training)} training steps; {len(held)} kept for validation")
    constants = fit(training)
    validation = errors(held, constants)
    seen = unseen = _width(held, constants)
    crossed: dict[str, Any] = {}
    names = list(dict.fromkeys(each.cluster for each in samples))
    if len(names) > 1:
        log(f"the band: fit to {names[0]} alone, predict {names[1]}")
        alone = fit([each for each in training if each.cluster == names[0]])
        other = [each for each in samples if each.cluster == names[1]]
        crossed, unseen = errors(other, alone), max(seen, _width(other, alone))
    for name, facts in validation.items():
        log(f"{name}: {facts['error_percent']} % mean error on {facts['rows']} rows of validation")
    return Calibration(
        constants, seen, unseen, tuple(dict.fromkeys(each.device.name for each in samples)),
        _provenance(folder, samples, errors(training, constants), validation, crossed),
    )  # fmt: skip


def _provenance(
    folder: Path,
    samples: Sequence[Sample],
    trained: dict[str, Any],
    validation: dict[str, Any],
    crossed: dict[str, Any],
) -> dict[str, Any]:
    clusters = folder / "clusters" if (folder / "clusters").is_dir() else folder
    about = {cluster.file: cluster.about for cluster in CLUSTERS}
    return {
        "source": _SOURCE,
        "files": {
            name: {
                "sha256": hashlib.sha256((clusters / name).read_bytes()).hexdigest(),
                "about": about[name],
                "validation_rows": f"lines of the file that {VALIDATION} divides; the others are trained on",
            }
            for name in dict.fromkeys(each.cluster for each in samples)
        },
        "training": trained,
        "validation": validation,
        "fitted_to_the_first_file_alone": crossed,
        "made_with": {name: importlib.metadata.version(name) for name in ("scipy", "numpy")},
        "command": "effcc calibrate --from-data --steps",
    }
