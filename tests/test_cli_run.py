"""``effcc run`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import LINEAR, PARAMETER_BYTES, Effcc, refused
from effcc.ir.plan_file import load_plan
from sample_plan import MIB


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
def test_run_puts_measured_beside_predicted(effcc: Effcc, linear: Path, tmp_path: Path, train: bool) -> None:
    plan, page, trace = tmp_path / "p.effcc", tmp_path / "page.html", tmp_path / "trace.json"
    options = ["--train", "--optimizer", "adamw"] if train else []
    assert effcc("plan", linear, *options, "-o", plan, "--no-report").code == 0
    result = effcc("run", plan, linear, "-n", 3, "--json", "--report", page, "--trace", trace)
    assert result.code == 0, result.err
    shown = result.json
    assert len(shown["measured"]["all_seconds"]) == 3
    assert shown["measured"]["seconds"] == sorted(shown["measured"]["all_seconds"])[1] > 0
    held = PARAMETER_BYTES * (3 if train else 1) + 32 * 64 * 4 + (4 * 4 if train else 0)
    assert shown["measured"]["held_before"] == held
    assert shown["measured"]["peak"] == pytest.approx(shown["predicted"]["peak"], rel=0.1)
    held_over_time = shown["measured"]["memory"]
    assert max(held_over_time) == shown["measured"]["peak"] and min(held_over_time) >= 0
    assert '<path class="measured" d="M' in page.read_text()
    events = json.loads(trace.read_text())["traceEvents"]
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {"cpu 0 (planned)", "measured"}
    assert any(event["name"].startswith("aten::") for event in events if event["ph"] == "X")


@pytest.mark.usefixtures("clean_compiler")
def test_run_refuses_a_plan_for_another_model(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    plan, other = tmp_path / "p.effcc", tmp_path / "other.py"
    other.write_text(LINEAR.replace("GELU", "ReLU"))
    assert effcc("plan", linear, "-o", plan, "--no-report").code == 0
    refused(effcc("run", plan, other), "another graph", "relu", "effcc plan")


def test_run_names_the_line_of_a_model_that_fails(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    plan, broken = tmp_path / "p.effcc", tmp_path / "broken.py"
    broken.write_text(LINEAR.replace("    return y.square", "    raise ValueError('not today')\n    return y.square"))
    assert effcc("plan", linear, "-o", plan, "--no-report").code == 0
    refused(effcc("run", plan, broken), "not today", "broken.py")


def test_run_refuses_what_cannot_fit(effcc: Effcc, linear: Path, sample: Path) -> None:
    import msgspec
    from effcc.ir.plan_file import save_plan

    loaded = load_plan(sample)
    huge = msgspec.structs.replace(loaded.plan.buffers[0], bytes=1 << 60)
    plan = msgspec.structs.replace(
        loaded.plan, buffers=(huge, *loaded.plan.buffers[1:]), peak={"device": (1 << 60) + 3 * MIB}
    )
    save_plan(sample, plan, loaded.graphs_text, {})
    refused(effcc("run", sample, linear), "1048576 TiB", "larger machine")
