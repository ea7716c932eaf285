"""``effcc inspect`` as a user calls it."""

from __future__ import annotations

import re
from pathlib import Path

from command_line import Effcc, refused
from sample_plan import FORWARD


def test_inspect_lists_and_shows_the_stages_of_a_plan(effcc: Effcc, sample: Path) -> None:
    stages = effcc("inspect", sample, "--json").json["stages"]
    assert [(stage["index"], stage["graph"], stage["name"]) for stage in stages] == [
        (0, "mlp", "mlp (planned)"),
        (1, "host.py", "host.py"),
    ]
    assert (stages[0]["ops"], stages[0]["phase"]) == (4, "inference")
    assert effcc("inspect", sample, "--show", 0).out.strip() == FORWARD.strip()
    assert effcc("inspect", sample, "--show", "host.py").out == "def run(x):\n    return x\n"
    assert "mlp" in effcc("inspect", sample).out


def test_inspect_refuses_what_is_not_there(effcc: Effcc, sample: Path, tmp_path: Path) -> None:
    refused(effcc("inspect", sample, "--show", "hots.py"), "hots.py", "did you mean 'host.py'?")
    refused(effcc("inspect", sample, "--node", "%nothing"), "%nothing")
    refused(effcc("inspect", sample, "--graph", "mlq"), "mlq", "graphs: ", "mlp")
    (tmp_path / "empty").mkdir()
    refused(effcc("inspect", tmp_path / "empty"), "EFFCC_DUMP")
    refused(effcc("inspect", tmp_path / "missing.effcc"), "missing.effcc")


def test_history_of_a_value_ends_at_its_address(effcc: Effcc, sample: Path) -> None:
    out = effcc("inspect", sample, "--node", "%h").out
    assert '%h comes from model.py:7 "h = x @ self.w (twice)" in layers.0' in out
    assert "read by 1" in out and "%y: f32[512,512] = aten.relu.default(%h)" in out
    assert re.search(r"step 0\s+library mm in layers\.\*, inference, 30 µs", out)
    assert re.search(r"buffer 2\s+scratch in layers\.0: 1\.00 MiB at device \+ 0, steps 0 to 2", out)
    assert "step 1" not in out


def test_dumps_are_inspected(effcc: Effcc, dead: Path, tmp_path: Path) -> None:
    """Listing, difference and history over the dumps of three passes, the last of which changes nothing."""
    dumps = tmp_path / "dumps"
    effcc("opt", dead, "-p", "common-subexpressions,dead-code,dead-code", "--dump", dumps)
    stages = effcc("inspect", dumps, "--json").json["stages"]
    assert [(stage["name"], stage["changed"], stage["ops"]) for stage in stages] == [
        ("input", True, 5),
        ("common-subexpressions", True, 4),
        ("dead-code", True, 3),
        ("dead-code", False, 3),
    ]
    difference = effcc("inspect", dumps, "--diff", 1, 2, "--json").json["diff"]
    assert [line[:12] for line in difference.splitlines() if line[:3] == "-  "] == ["-  %unused: "]
    assert "the two are equal" in effcc("inspect", dumps, "--diff", 2, 3).out
    history = effcc("inspect", dumps, "--node", "%z", "--json").json
    assert history["source"] == 'model.py:5 "c = x.cos()" in layers.1'
    assert [event["what"] for event in history["events"]] == ["appears, read by 1", "goes: %y takes its place"]


def test_equal_names_in_a_subgraph_are_another_value(effcc: Effcc, tmp_path: Path) -> None:
    text = """graph @outer phase=inference {
  graph @layer phase=inference {
    %x: f32[4] = input()  role(input)
    %h: f32[4] = aten.sin.default(%x)
    return (%h)
  }
  %x: f32[4] = input()  role(input)
  %c: (f32[4],) = call(@layer, %x)
  %g: f32[4] = getitem(%c, 0)
  %h: f32[4] = aten.cos.default(%g)
  return (%h)
}
"""
    (tmp_path / "nested.ir").write_text(text)
    assert effcc("opt", tmp_path / "nested.ir", "--dump", tmp_path / "dumps").code == 0
    events = effcc("inspect", tmp_path / "dumps", "--node", "h", "--json").json["events"]
    assert [(event["stage"], event["lines"][0]) for event in events] == [
        ("000 input (in @outer)", "%h: f32[4] = aten.cos.default(%g)"),
        ("000 input (in @layer)", "%h: f32[4] = aten.sin.default(%x)"),
    ]
