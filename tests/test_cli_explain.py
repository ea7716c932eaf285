"""``effcc explain`` and ``effcc report`` as a user calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from command_line import Effcc
from effcc.cost_model.devices import FOLDER
from effcc.ir.plan import Alternative, Decision
from effcc.ir.plan_file import save_plan
from sample_plan import FORWARD, MIB, make_sample, write_sample


def test_explain_as_json(effcc: Effcc, sample: Path) -> None:
    shown = effcc("explain", sample, "--json").json
    summary = shown["summary"]
    assert summary["peak"] == 4 * MIB
    assert summary["peak_position"] == 1
    assert summary["roles"] == {"input": MIB, "parameter": MIB, "scratch": MIB, "output": MIB}
    assert sum(holder["bytes"] for holder in summary["holders"]) == 4 * MIB
    assert summary["fits"] is True
    assert summary["flop"] == 2 * 512**3 + 512 * 512
    assert [group["name"] for group in summary["groups"]] == ["mm", "relu"]
    assert shown["fallbacks"] == [
        {"op": "aten.cholesky.default", "reason": "no kernel <for> it", "source": "model.py:9"}
    ]
    assert shown["solvers"][0]["gap"] == 0.0


def test_explain_says_who_holds_the_peak_what_is_slow_and_what_fell_back(effcc: Effcc, sample: Path) -> None:
    out = effcc("explain", sample).out
    capacity = json.loads((FOLDER / "l4.json").read_text())["tiers"]["device"]["capacity"]["value"]
    assert f"fits on l4: 4.00 MiB of {capacity / 2**30:.2f} GiB" in out
    assert re.search(r"1\.00 MiB\s+25\.0 %\s+scratch\s+1\s+model\.py:7", out)
    # 2 * 512^3 flop in 30 us.
    assert re.search(r"30 µs\s+75\.0 %\s+1\s+library mm\s+inference", out)
    assert re.search(r"aten\.cholesky\.default\s+no kernel <for> it\s+model\.py:9", out)


def test_explain_schedule_says_the_model_its_answer_and_the_gap(effcc: Effcc, tmp_path: Path) -> None:
    ways = (Alternative(what="as Inductor orders them", value=3 * MIB), Alternative(what="least memory", value=2 * MIB))
    order = Decision(
        kind="kernel order", subject="2 kernels of a region", chosen="least memory", alternatives=ways, unit="bytes",
        bound=1.5 * MIB,
    )  # fmt: skip
    path = tmp_path / "plan.effcc"
    save_plan(path, msgspec.structs.replace(make_sample(), decisions=(order,)), {"mlp": FORWARD}, {})
    shown = effcc("explain", path, "--schedule", "--json").json["schedule"]
    assert shown["seconds"] == shown["bound"] == 4e-5 and shown["gap"] == 0.0
    assert shown["peak"] == shown["peak_bound"] == 4 * MIB
    assert shown["streams"] == [{"device": 0, "stream": "compute", "steps": 2, "busy": 4e-5, "alone": 4e-5}]
    # 2 x 2 of done, and the peak: nothing is freed before the end.
    assert shown["model"]["kernels"] == 2 and shown["model"]["variables"] == 5
    assert shown["decisions"][0]["gap"] == 0.25
    assert shown["decisions"][0]["alternatives"][0] == {
        "what": "as Inductor orders them", "value": 3 * MIB, "measured": False
    }  # fmt: skip
    assert [each["how"] for each in shown["sequence"]] == ["CP-SAT in windows around the peak"]
    out = effcc("explain", path, "--schedule").out
    assert "minimize peak" in out and "a gap of 0.00 %" in out
    assert "What the sequence costs: at most 0.00 % of the time" in out, "an order takes no time"
    assert re.search(r"least memory\s+2\.00 MiB\s+as Inductor orders\s", out) and "25.00 %" in out


def test_explain_schedule_says_what_deciding_in_sequence_may_lose(effcc: Effcc, tmp_path: Path) -> None:
    """Of 40 us: 4 more than without a limit, fusion proven within 2. Ten variants are told in short."""
    fusion = Decision(
        kind="fusion", subject="2 components as one model", chosen="together", bound=8e-6,
        alternatives=(Alternative(what="as written", value=3e-5), Alternative(what="together", value=1e-5)),
    )  # fmt: skip
    kept = Decision(
        kind="activations", subject="a step that may hold 4.00 MiB", chosen="3 recompute",
        alternatives=(Alternative(what="3 recompute", value=4.4e-5), Alternative(what="all kept", value=4e-5)),
    )  # fmt: skip
    tiles = tuple(Alternative(what=f"tile {n}", value=(10 + n) * 1e-6) for n in range(10))
    kernel = Decision(kind="kernel", subject="kernel 1", chosen="tile 1", alternatives=tiles, bound=1e-5)
    orders = [
        Decision(
            kind="kernel order", subject=f"{n} kernels of region{n}", chosen="as the ops stand", unit="bytes",
            alternatives=(Alternative(what="as the ops stand", value=MIB), Alternative(what="least memory", value=MIB)),
            bound=MIB,
        )
        for n in (2, 3)
    ]  # fmt: skip
    path = tmp_path / "plan.effcc"
    chosen = (fusion, kept, kernel, *orders)
    save_plan(path, msgspec.structs.replace(make_sample(), decisions=chosen), {"mlp": FORWARD}, {})
    shown = effcc("explain", path, "--schedule", "--json").json["schedule"]
    assert shown["together_bound"] == pytest.approx(4e-5 - 4e-6 - 2e-6)
    assert shown["sequence_loss"] == pytest.approx(0.15)
    assert [each["decisions"] for each in shown["sequence"][:3]] == [2, 1, 2]
    assert len(shown["decisions"][2]["alternatives"]) == 10
    out = effcc("explain", path, "--schedule").out
    assert "at most 15.00 % of the time" in out
    assert "2 regions" in out and "proven to need least" in out
    assert "tile 9" not in out
    assert re.search(r"\band 7\b", out), "two alternatives are told, the rest is counted"


def test_explain_over_budget(effcc: Effcc, tmp_path: Path) -> None:
    over = write_sample(tmp_path, budget=4 * MIB)
    assert "The memory budget of 4.00 MiB is kept." in effcc("explain", over).out


def test_report_is_written_beside_the_plan(effcc: Effcc, sample: Path) -> None:
    result = effcc("report", sample, "--json")
    page = Path(result.json["report"])
    assert page == sample.with_suffix(".html")
    assert "4.00 MiB" in page.read_text()
    assert effcc("report", sample, "-o", sample.parent / "other.html").out.strip().endswith("other.html")
