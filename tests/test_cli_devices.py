"""``effcc devices`` and ``effcc calibrate`` as a user calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Effcc, refused
from effcc.cost_model.devices import FOLDER


def test_devices(effcc: Effcc) -> None:
    shown = effcc("devices", "--json").json
    assert {"cpu", "h100", "h200", "a100-80g", "l4", "rtx4090", "mi300x", "tpu-v4i-like"} <= shown.keys()
    assert shown["h200"] == effcc("devices", "h200", "--json").json
    assert "h200" in effcc("devices").out
    # Every figure is printed with its source.
    file = json.loads((FOLDER / "h200.json").read_text())
    out = re.sub(r"\s+", " ", effcc("devices", "h200").out)
    assert file["matrix"]["bf16"]["source"][:40] in out
    refused(effcc("devices", "h201"), "h201", "h200")


def test_calibrate_writes_a_device_that_plans_can_use(
    effcc: Effcc, linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement itself has its own tests; here it is the packaged device with another capacity."""
    from effcc import calibrating
    from effcc.cost_model.devices import load_device
    from effcc.cost_model.measuring_time import Account

    measured = {}

    def fake(seconds: float, save: bool, account: Account) -> Any:
        assert account.measured == account.compiled == 0.0
        measured.update(seconds=seconds, save=save)
        return load_device("cpu")

    monkeypatch.setattr(calibrating, "calibrate_machine", fake)
    target = tmp_path / "mine.json"
    assert effcc("calibrate", "--seconds", 2, "--no-save", "-o", target).code == 0
    assert measured == {"seconds": 2.0, "save": False}
    assert effcc("plan", linear, "-d", target, "-o", tmp_path / "p.effcc", "--json").json["summary"]["device"] == "cpu"
    assert effcc("calibrate", "--seconds", 0.5).code == 2
    refused(effcc("calibrate", "-o", tmp_path), "folder")
