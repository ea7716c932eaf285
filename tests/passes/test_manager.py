"""The pass manager: verification around passes, records, failures that can be repeated."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from effcc.errors import PassError, VerificationError
from effcc.ir.graph import Graph, Location, Ref
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.passes.dead_code import DeadCode
from effcc.passes.manager import DUMP_VARIABLE, PassManager
from effcc.passes.pipeline import Pass, parse_pipeline

TEXT = """graph @main phase=inference {
  %x: f32[4] = input()  role(input)
  %unused: f32[4] = aten.exp.default(%x)
  %y: f32[4] = aten.neg.default(%x)  loc(model.py:7 "y = -x" in head)
  return (%y)
}
"""
AFTER = """graph @main phase=inference {
  %x: f32[4] = input()  role(input)
  %y: f32[4] = aten.neg.default(%x)  loc(model.py:7 "y = -x" in head)
  return (%y)
}
"""


@dataclass(frozen=True)
class ReadsTheFuture:
    """A broken pass: its result reads a value that is not defined."""

    name: ClassVar[str] = "reads-the-future"
    label: str = "it's"

    def apply(self, graph: Graph) -> Graph:
        *rest, last = graph.nodes
        return graph.with_nodes((*rest, replace(last, args=(Ref("nowhere"),))))


@dataclass(frozen=True)
class Stumbles:
    """A broken pass: it raises."""

    name: ClassVar[str] = "stumbles"

    def apply(self, graph: Graph) -> Graph:
        return {}["absent"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Moves:
    """A pass that renames the module of each op, and so changes the graph every time."""

    name: ClassVar[str] = "moves"

    def apply(self, graph: Graph) -> Graph:
        return graph.with_nodes(tuple(replace(node, location=Location(module="moved")) for node in graph.nodes))


@pytest.fixture(autouse=True)
def no_dump_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DUMP_VARIABLE, raising=False)


def test_passes_run_in_order_and_are_recorded() -> None:
    manager = PassManager(parse_pipeline("dead-code,regions{alone=[aten.neg]}"))
    result = manager.run(parse_graph(TEXT))
    assert print_graph(result) == AFTER.replace("in head)", "in head)  region(0)")
    recorded = [(r.name, r.text, r.changed, r.ops_before, r.ops_after, r.failed) for r in manager.records]
    assert recorded == [
        ("dead-code", "dead-code", True, 3, 2, ""),
        ("regions", "regions{alone=[aten.neg]}", True, 2, 2, ""),
    ]
    assert all(record.seconds >= 0 and record.graph == "main" for record in manager.records)


def test_the_callback_sees_the_graph_on_both_sides_of_each_pass() -> None:
    seen: list[tuple[str, str, int]] = []

    def watch(moment: str, pass_: Pass, graph: Graph) -> None:
        seen.append((moment, pass_.name, len(graph.nodes)))

    PassManager(parse_pipeline("dead-code,dead-code"), callback=watch).run(parse_graph(TEXT))
    assert seen == [
        ("before", "dead-code", 3),
        ("after", "dead-code", 2),
        ("before", "dead-code", 2),
        ("after", "dead-code", 2),
    ]


def test_a_bad_graph_is_refused_before_the_first_pass() -> None:
    graph = parse_graph(TEXT.replace("exp.default(%x)", "exp.default(%y)"))
    with pytest.raises(VerificationError, match="reads %y, which is defined only later"):
        PassManager(parse_pipeline("dead-code")).run(graph)
    unchecked = PassManager(parse_pipeline("dead-code"), verify=False).run(graph)
    assert print_graph(unchecked) == AFTER


@pytest.mark.parametrize("given", ["folder", "variable", "nothing"])
@pytest.mark.parametrize("broken", [ReadsTheFuture(), Stumbles()], ids=lambda pass_: pass_.name)
def test_a_broken_pass_is_named_and_can_be_repeated(
    broken: Pass, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "dumps of today"
    if given == "variable":
        monkeypatch.setenv(DUMP_VARIABLE, str(folder))
    manager = PassManager([DeadCode(), broken], dump_dir=folder if given == "folder" else None)
    with pytest.raises(PassError) as caught:
        manager.run(parse_graph(TEXT))
    error = caught.value
    reason = "reads %nowhere, which is not defined" if broken.name == "reads-the-future" else "KeyError: 'absent'"
    assert f"pass {broken.name} failed on graph main" in error.message and reason in error.message
    if broken.name == "reads-the-future":
        assert error.where == "model.py:7 in head"
    # The remedy is a command a shell takes apart into the file and the pass again.
    command = shlex.split(error.remedy.partition(": ")[2])
    assert command[:2] == ["effcc", "opt"] and command[3:] == ["-p", broken.name]
    saved = Path(command[2])
    assert given == "nothing" or saved == folder / f"002-{broken.name}-failed.ir"
    text = saved.read_text()
    assert shlex.split(text.splitlines()[0].removeprefix("# ")) == command
    assert reason in text.partition("graph @main phase")[0]
    assert parse_graph(text) == parse_graph(AFTER), "the graph that the pass was given"
    assert [(record.name, bool(record.failed)) for record in manager.records] == [
        ("dead-code", False),
        (broken.name, True),
    ]


def test_options_of_the_failing_pass_stand_in_the_command(tmp_path: Path) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([ReadsTheFuture(label="a b")], dump_dir=tmp_path).run(parse_graph(TEXT))
    assert shlex.split(caught.value.remedy)[-1] == 'reads-the-future{label="a b"}'


def test_dumps_reach_torchs_structured_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TORCH_TRACE and tlparse get are the texts of the dumped files: the input and each pass that changed it."""
    import torch._inductor.config
    import torch._logging

    artifacts: dict[str, str] = {}

    def trace(kind: str, metadata_fn: Any = dict, payload_fn: Any = str, **_: Any) -> None:
        assert kind == "artifact" and metadata_fn()["encoding"] == "string"
        artifacts[metadata_fn()["name"]] = payload_fn()

    monkeypatch.setattr(torch._logging, "trace_structured", trace)
    PassManager([DeadCode(), DeadCode(), Moves()], dump_dir=tmp_path).run(parse_graph(TEXT))
    files = {path.name: path.read_text() for path in tmp_path.glob("*.ir")}
    assert files["000-input.ir"] == TEXT and files["001-dead-code.ir"] == AFTER
    assert sorted(files) == ["000-input.ir", "001-dead-code.ir", "003-moves.ir"]
    assert artifacts == {
        "effcc_main_input": files["000-input.ir"],
        "effcc_main_001_dead-code": files["001-dead-code.ir"],
        "effcc_main_003_moves": files["003-moves.ir"],
    }


def test_torchs_trace_writes_what_it_is_handed(tmp_path: Path) -> None:
    """The same through torch itself: the payload of a real trace record."""
    import logging

    import torch._inductor.config  # noqa: F401
    from torch._logging._internal import trace_log

    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keep()
    propagates, trace_log.propagate = trace_log.propagate, False
    trace_log.addHandler(handler)
    try:
        PassManager([DeadCode()]).run(parse_graph(TEXT))
    finally:
        trace_log.removeHandler(handler)
        trace_log.propagate = propagates
    payloads = {
        record.metadata["artifact"]["name"]: record.payload  # type: ignore[attr-defined]
        for record in records
        if "artifact" in getattr(record, "metadata", {})
    }
    assert payloads == {"effcc_main_input": TEXT, "effcc_main_000_dead-code": AFTER}


def test_torchs_debug_folder_receives_the_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo.config
    import torch._inductor.config
    from torch._dynamo.utils import get_debug_dir

    monkeypatch.setattr(torch._dynamo.config, "debug_dir_root", str(tmp_path))
    monkeypatch.delenv("EFFCC_DUMP", raising=False)
    graph = parse_graph("graph @g phase=inference { %x: f32[4] = input()  return (%x) }")
    PassManager(parse_pipeline("dead-code")).run(graph)
    assert not list(tmp_path.rglob("*.ir"))
    monkeypatch.setenv("TORCH_COMPILE_DEBUG", "1")
    PassManager(parse_pipeline("dead-code")).run(graph)
    assert (Path(get_debug_dir()) / "effcc" / "000-input.ir").is_file()
