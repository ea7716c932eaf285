"""Kernel times: error and bands of the predictions, beside NeuSight's published errors.

    EFFCC_BENCH_DATA=... .venv/bin/python benchmarks/kernel_prediction.py [--left-out] [--model FILE]

Measured devices: the packaged model on the data's own test rows, which training never reads. ``--left-out`` (a minute
or two a device) trains anew without each device in turn, its published rate too, and predicts that device's test rows:
from published figures alone, and corrected by ten of its rows. The devices that NeuSight never saw have no rows in the
data folder; its errors there are kept in the results for orientation only.
Results go to ``benchmarks/results/kernel_prediction.json``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from effcc.cost_model.kernel_time import gpus, model_file, rows, training
from effcc.cost_model.kernel_time.model import Banded, KernelModel, adapt, predict
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "kernel_prediction.json"
#: Lee et al., NeuSight, ASPLOS 2025: mean absolute percentage error in fp32 on measured devices, and on unseen ones.
NEUSIGHT = {
    "bmm": (26.0, 13.8),
    "linear": (20.0, 13.9),
    "pointwise": (14.0, 19.3),
    "softmax": (19.3, 13.9),
    "norm": (20.1, 56.7),
}
SHOTS, DRAWS = 10, 10


def test_groups(folder: Path) -> list[rows.Rows]:
    """Measured test rows, a group for each family and device (a device's pointwise ops together)."""
    parts: dict[tuple[str, str], list[rows.Rows]] = defaultdict(list)
    for file in sorted(folder.glob("*.known_devices_test.csv.gz")):
        for group in rows.read(file, measured=True).groups:
            parts[group.family, group.device].append(group)
    assert all(len(groups) == 1 for groups in parts.values())
    return [groups[0] for groups in parts.values()]


def errors(banded: Banded, group: rows.Rows) -> tuple[np.ndarray, np.ndarray]:
    """Absolute relative error (percent) of each row, and whether it lies in the band."""
    assert group.seconds is not None
    inside = (group.seconds >= banded.low) & (group.seconds <= banded.high)
    return 100 * np.abs(banded.seconds / group.seconds - 1), inside


def few_shot(group: rows.Rows, model: KernelModel, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors and cover of the other rows after ten random rows of the group, over several draws."""
    generator = np.random.default_rng(seed)
    gpu = gpus.find(group.device)
    found = []
    for _ in range(DRAWS):
        order = generator.permutation(len(group))
        few, rest = group.take(order[:SHOTS]), group.take(order[SHOTS:])
        if len(rest):
            found.append(errors(adapt(rest, gpu, [few], model), rest))
    return np.concatenate([each[0] for each in found]), np.concatenate([each[1] for each in found])


def summary(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Mean error and cover over all rows, and by device."""
    every = np.concatenate([each for each, _ in found.values()])
    inside = np.concatenate([each for _, each in found.values()])
    return {
        "error_percent": round(float(every.mean()), 2),
        "median_percent": round(float(np.median(every)), 2),
        "in_band_percent": round(100 * float(inside.mean()), 1),
        "rows": len(every),
        "by_device": {
            device: {"error_percent": round(float(e.mean()), 2), "in_band_percent": round(100 * float(i.mean()), 1)}
            for device, (e, i) in found.items()
        },
    }


def measured_devices(groups: list[rows.Rows], model: KernelModel) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for group in groups:
        found[group.family][group.device] = errors(predict(group, gpus.find(group.device), model), group)
    return {family: summary(devices) for family, devices in found.items()}


def left_out_devices(folder: Path, groups: list[rows.Rows], seed: int) -> dict[str, Any]:
    known, _ = training.load_training_rows(folder)
    zero: dict[str, dict[str, Any]] = defaultdict(dict)
    ten: dict[str, dict[str, Any]] = defaultdict(dict)
    for device in sorted({group.device for group in groups}):
        rest = [group for group in known if group[0].device != device]
        model = training.train(rest, seed, unseen={gpus.key(device)})
        for group in groups:
            if group.device == device:
                zero[group.family][device] = errors(predict(group, gpus.find(device), model), group)
                ten[group.family][device] = few_shot(group, model, seed)
    return {family: {"from_figures": summary(zero[family]), "after_ten_rows": summary(ten[family])} for family in zero}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--left-out", action="store_true", help="also train without each device in turn")
    parser.add_argument("--model", type=Path, help="a model other than the packaged one")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = os.environ.get("EFFCC_BENCH_DATA")
    if not data:
        parser.error("set EFFCC_BENCH_DATA to the folder above kernels/")
    folder = Path(data) / "kernels"
    groups = test_groups(folder)
    model = model_file.load(arguments.model or model_file.PACKAGED)
    begin = time.perf_counter()
    known = measured_devices(groups, model)
    seconds = time.perf_counter() - begin
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    left_out = left_out_devices(folder, groups, arguments.seed) if arguments.left_out else old.get("left_out", {})
    table = Table(
        "family", "measured devices", "in band", "NeuSight", "left out", "in band", "after 10 rows", "in band"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for family, (published, _) in NEUSIGHT.items():
        if family not in known:
            continue
        cells = [
            f"{known[family]['error_percent']:.1f} %",
            f"{known[family]['in_band_percent']:.0f} %",
            f"{published} %",
        ]
        for part in ("from_figures", "after_ten_rows"):
            each = left_out.get(family, {}).get(part)
            cells += [f"{each['error_percent']:.1f} %", f"{each['in_band_percent']:.0f} %"] if each else ["", ""]
        table.add_row(family, *cells)
    Console(width=120).print(table)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in ("effcc", "numpy", "lightgbm")},
        "trained_on": model.provenance,
        "seconds_for_all_rows": round(seconds, 3),
        "neusight_percent": {
            family: dict(zip(("measured", "unseen"), each, strict=True)) for family, each in NEUSIGHT.items()
        },
        "measured_devices": known,
        "left_out": left_out,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
