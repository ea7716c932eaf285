"""``effcc map-memory PLAN.effcc`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import effcc
import pytest
import torch
from command_line import Effcc
from models import Tower


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiers") / "tower.effcc"
    effcc.plan(Tower(width=256, depth=2), (torch.ones(512, 256),), device="tpu-v4i-like").save(path)
    return path


def test_a_plan_is_mapped_beside_the_baselines(effcc: Effcc, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.json"
    done = effcc("map-memory", plan, "--capacity", 2 << 20, "--time-limit", 2, "-o", out, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert set(facts["baselines"]) == {"all in device memory", "best-fit heap", "greedy by benefit per byte"}
    assert facts["bound"] <= facts["makespan"] <= min(each["makespan"] for each in facts["baselines"].values())
    assert facts["makespan"] < facts["baselines"]["all in device memory"]["makespan"]
    assert 0 < facts["height"] <= facts["capacity"] == 2 << 20
    uses = json.loads(out.read_text())["uses"]
    assert {use["fate"] for use in uses} <= {"copy", "no-copy", "drop"}
    assert all((use["offset"] is None) == (use["tier"] == "device") == (use["fate"] == "drop") for use in uses)


def test_the_table_names_who_is_compared(effcc: Effcc, plan: Path) -> None:
    done = effcc("map-memory", plan, "--time-limit", 1)
    assert done.code == 0, done.err
    assert "best-fit heap" in done.out and "No choice is faster than" in done.out


def test_a_device_without_a_scratchpad_is_refused(effcc: Effcc, plan: Path) -> None:
    done = effcc("map-memory", plan, "--device", "cpu")
    assert done.code == 2 and "scratchpad" in done.err
    done = effcc("map-memory", plan, plan)
    assert done.code == 2 and "one after the other" in done.err
