"""The kernel-time model on public measurements. ``EFFCC_BENCH_DATA`` names the folder that holds them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from effcc.cost_model.kernel_time import gpus, model, model_file, rows, training
from fresh_seed import fresh_random

DATA = Path(os.environ.get("EFFCC_BENCH_DATA", "")) / "kernels"
pytestmark = pytest.mark.skipif(
    not os.environ.get("EFFCC_BENCH_DATA") or not DATA.is_dir(),
    reason="EFFCC_BENCH_DATA does not name a folder with kernels/",
)
#: Mean absolute percentage error of NeuSight (Lee et al., ASPLOS 2025) in fp32 on these devices' test rows.
NEUSIGHT = {"bmm": 26.0, "linear": 20.0, "pointwise": 14.0, "softmax": 19.3, "norm": 20.1}
TEST_FILES = {"bmm": "bmm", "linear": "linear", "pointwise": "elem", "softmax": "softmax", "norm": "ln"}


@pytest.mark.parametrize("family", NEUSIGHT)
def test_measured_devices_are_predicted_better_than_neusight_does(family: str) -> None:
    """On rows that training never reads, with eight or nine in ten within the band."""
    packaged = model_file.load(model_file.PACKAGED)
    table = rows.read(DATA / f"{TEST_FILES[family]}.known_devices_test.csv.gz", measured=True)
    error, inside = [], []
    for group in table.groups:
        assert group.family == family and group.seconds is not None
        made = model.predict(group, gpus.find(group.device), packaged)
        error.append(np.abs(made.seconds / group.seconds - 1))
        inside.append((group.seconds >= made.low) & (group.seconds <= made.high))
    assert 100 * np.concatenate(error).mean() < NEUSIGHT[family]
    assert np.concatenate(inside).mean() > 0.75


def test_ten_rows_halve_the_error_of_a_device_read_from_wrong_figures() -> None:
    """A T4 described with twice its memory bandwidth: its pointwise rows are predicted too fast until ten are seen."""
    packaged = model_file.load(model_file.PACKAGED)
    figures = {"title": "mine", "units": 40, "lanes": 64, "boost_mhz": 1590, "bandwidth_gbs": 640, "l2_mb": 4}
    gpu = gpus.find("mine", gpus.read_device_file(Path("f.json"), json.dumps(figures)))
    table = rows.read(DATA / "elem.known_devices_test.csv.gz", measured=True)
    group = next(group for group in table.groups if group.device == "Tesla T4")
    order = np.random.default_rng(fresh_random().getrandbits(32)).permutation(len(group))
    few, rest = group.take(order[:10]), group.take(order[10:])
    assert rest.seconds is not None
    before, after = model.predict(rest, gpu, packaged), model.adapt(rest, gpu, [few], packaged)
    wrong, right = (float(np.abs(each.seconds / rest.seconds - 1).mean()) for each in (before, after))
    assert wrong > 0.3 and right < 0.1


def test_training_is_one_command_that_leaves_test_rows_alone(tmp_path: Path) -> None:
    """On a sample of the rows, test rows that would ruin it beside them."""
    pytest.importorskip("lightgbm", reason="needs the extra train")
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name in ("add", "softmax"):
        text = rows.read(DATA / f"{name}.train.csv.gz", measured=True)
        lines = [text.header, *text.lines[:: 4 if name == "add" else 10]]
        (folder / f"{name}.train.csv").write_text(
            "\n".join(",".join(cell.replace(",", ";") for cell in line) for line in lines)
        )
    (folder / "softmax.known_devices_test.csv").write_text("OPName,Device,Latency,B,H\nsoftmax,Tesla T4,1e9,1,1\n" * 9)
    trained = training.train_from(tmp_path)
    assert set(trained.families) == {"pointwise", "softmax"}
    assert set(trained.provenance["files"]) == {"add.train.csv", "softmax.train.csv"}
    again = model_file.decode(model_file.encode(trained), "x")
    table = rows.read(DATA / "softmax.known_devices_test.csv.gz", measured=True)
    error = []
    for group in table.groups:
        assert group.seconds is not None
        error.append(np.abs(model.predict(group, gpus.find(group.device), again).seconds / group.seconds - 1))
    assert np.concatenate(error).mean() < 0.193
