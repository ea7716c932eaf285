"""``effcc explain`` and ``effcc report`` as a user calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from command_line import Effcc
from effcc.cost_model.devices import FOLDER
from sample_plan import MIB, write_sample


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


def test_explain_over_budget(effcc: Effcc, tmp_path: Path) -> None:
    over = write_sample(tmp_path, budget=4 * MIB)
    assert "The memory budget of 4.00 MiB is kept." in effcc("explain", over).out


def test_report_is_written_beside_the_plan(effcc: Effcc, sample: Path) -> None:
    result = effcc("report", sample, "--json")
    page = Path(result.json["report"])
    assert page == sample.with_suffix(".html")
    assert "4.00 MiB" in page.read_text()
    assert effcc("report", sample, "-o", sample.parent / "other.html").out.strip().endswith("other.html")
