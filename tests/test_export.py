"""``effcc export``: what other tools read is what the plan and the graph say."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import Effcc, refused
from effcc.export.chrome_trace import chrome_trace
from effcc.export.memory_snapshot import memory_snapshot
from effcc.ir.plan import Plan
from effcc.ir.plan_file import load_plan
from effcc.summary import live_use
from plan_files import small_plan
from sample_plan import MIB, make_sample

TRACE_PHASES = {"X", "C", "M"}


def test_each_step_is_an_event_on_the_thread_of_its_stream() -> None:
    plan = small_plan()
    events = chrome_trace(plan)["traceEvents"]
    assert {event["ph"] for event in events} <= TRACE_PHASES
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(threads.values()) == sorted({step.stream for step in plan.steps})
    steps = {event["args"]["step"]: event for event in events if event["ph"] == "X"}
    assert steps.keys() == {step.id for step in plan.steps}
    for step in plan.steps:
        event = steps[step.id]
        assert (event["ts"], event["dur"]) == pytest.approx((1e6 * step.start, 1e6 * step.seconds))
        assert threads[event["tid"]] == step.stream and event["cat"] == step.phase
    live = [event["args"]["live"] for event in events if event["ph"] == "C" and event["name"] == "device memory"]
    assert live == live_use(plan)[: len(plan.steps)]


def test_a_measured_step_stands_beside_the_plan() -> None:
    given = [
        {"ph": "X", "ts": 1000.0, "dur": 5.0, "pid": 7, "tid": 9, "name": "aten::mm"},
        {"ph": "X", "ts": 1005.0, "dur": 2.0, "pid": 7, "tid": 9, "name": "aten::relu"},
        {"ph": "i", "ts": 900.0, "name": "a mark"},
    ]
    trace = chrome_trace(make_sample(), given, [0, 3 * MIB, MIB], 4e-5)
    (process,) = {event["pid"] for event in trace["traceEvents"] if event["name"].startswith("aten::")}
    assert process not in {step.device for step in make_sample().steps}
    begins = [event["ts"] for event in trace["traceEvents"] if event["name"].startswith("aten::")]
    assert begins == [0.0, 5.0]
    held = [(e["ts"], e["args"]["held"]) for e in trace["traceEvents"] if e["ph"] == "C" and e["pid"] == process]
    assert [moment for moment, _ in held] == pytest.approx([0.0, 20.0, 40.0])
    assert [size for _, size in held] == [0, 3 * MIB, MIB]


@pytest.mark.parametrize("plan", [make_sample(), small_plan()], ids=["sample", "small"])
def test_a_snapshot_holds_what_the_plan_holds_and_is_read_by_torchs_own_tools(plan: Plan) -> None:
    """torch.cuda._memory_viz draws the same snapshots as the web page."""
    from torch.cuda import _memory_viz

    snapshot = memory_snapshot(plan)
    live = live_use(plan)
    held: dict[int, int] = {}
    most, segments = 0, {}
    for entry in snapshot["device_traces"][0]:
        if entry["action"] == "segment_alloc":
            segments[entry["addr"]] = entry["size"]
        elif entry["action"] == "alloc":
            assert entry["addr"] not in held
            base = max(address for address in segments if address <= entry["addr"])
            assert entry["addr"] + entry["size"] <= base + segments[base]
            held[entry["addr"]] = entry["size"]
            most = max(most, sum(held.values()))
        elif entry["action"] == "free_completed":
            assert held.pop(entry["addr"]) == entry["size"]
    assert most == max(live)
    for segment in snapshot["segments"]:
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    assert "alloc" in _memory_viz.trace(snapshot)
    assert _memory_viz.segsum(snapshot)
    page = _memory_viz.trace_plot(snapshot)
    assert "MemoryViz" in page


def test_the_commands_files(effcc: Effcc, sample: Path, dead: Path, tmp_path: Path) -> None:
    trace = effcc("export", sample, "--to", "chrome-trace", "--json").json
    assert trace["path"] == str(sample.with_suffix(".trace.json"))
    assert json.loads(Path(trace["path"]).read_text())["otherData"]["model"] == "sample"
    out = tmp_path / "memory.pickle"
    assert effcc("export", sample, "--to", "memory-snapshot", "-o", out).out.strip() == str(out)
    assert pickle.loads(out.read_bytes()) == memory_snapshot(load_plan(sample).plan)
    assert effcc("export", dead, "--to", "dot", "-o", tmp_path / "dead.dot").code == 0
    dot = (tmp_path / "dead.dot").read_text()
    for name in ("x", "unused", "y", "z", "sum"):
        assert re.search(rf'^    ":{name}" \[label="%{name}\\n', dot, re.MULTILINE), dot
    assert '":y" -> ":sum";' in dot and '":sum" -> ":<return>";' in dot
    assert "model.py:4" in dot
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg", tmp_path / "dead.dot", "-o", tmp_path / "dead.svg"], check=True)


def test_a_graph_for_model_explorer(effcc: Effcc, tmp_path: Path) -> None:
    text = """graph @outer phase=inference {
  graph @layer phase=inference {
    %a: f32[4] = input()  role(input)
    %b: f32[4] = aten.sin.default(%a)  loc(model.py:3 "x.sin()" in layers.0)
    return (%b)
  }
  %x: f32[4] = input()  role(input)
  %c: (f32[4],) = call(@layer, %x)
  %y: f32[4] = getitem(%c, 0)
  return (%y)
}
"""
    (tmp_path / "g.ir").write_text(text)
    assert effcc("export", tmp_path / "g.ir", "--to", "model-explorer").code == 0
    (collection,) = json.loads((tmp_path / "g.explorer.json").read_text())
    assert [graph["id"] for graph in collection["graphs"]] == ["outer", "layer"]
    outer, layer = ({node["id"]: node for node in graph["nodes"]} for graph in collection["graphs"])
    assert outer.keys() == {"x", "c", "y", "<return>"}
    assert outer["y"]["incomingEdges"][0]["sourceNodeId"] == "c"
    assert outer["<return>"]["incomingEdges"][0]["sourceNodeId"] == "y"
    assert layer["b"]["namespace"] == "layers/0" and layer["b"]["label"] == "aten.sin.default"
    assert {"key": "source", "value": 'model.py:3 "x.sin()"'} in layer["b"]["attrs"]


def test_what_cannot_be_exported_is_refused(effcc: Effcc, sample: Path, dead: Path) -> None:
    refused(effcc("export", sample, "--to", "chrome-trce"), "did you mean 'chrome-trace'?")
    refused(effcc("export", dead, "--to", "memory-snapshot"), "plan.effcc")
    refused(effcc("export", sample, "--to", "dot", "--stage", "nothing"), "nothing")
    refused(effcc("export", sample, "--to", "memory-snapshot", "--tier", "disc"), "disk")
