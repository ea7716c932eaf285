"""The IR on every graph of real models: equal when read back, sound before and after each pass, with source lines."""

from __future__ import annotations

import functools
import linecache
from collections.abc import Iterator
from dataclasses import dataclass

import effcc
import pytest
from effcc.ir.graph import Graph, Node
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.ir.verifier import verify
from effcc.passes.manager import PassManager
from effcc.passes.pipeline import Pass, parse_pipeline
from effcc.plan_request import PIPELINE
from effcc.planning import Planned
from models import ZOO, build
from some_by_default import some_by_default

#: The others take 10 to 60 seconds each.
names = some_by_default(ZOO, {"resnet"})
modes = pytest.mark.parametrize("train", some_by_default([True, False], {False}), ids=["train", "inference"])


@functools.cache
def planned(name: str, train: bool) -> Planned:
    sample = build(name)
    sample.model.train(train)
    return effcc.plan(sample.model, sample.inputs, train=train)


def graphs_of(name: str, train: bool) -> list[Graph]:
    """Forward, backward and inference graphs, and those of Dynamo that plans are matched by."""
    captured = planned(name, train).captured
    return [*captured.graphs, *(frame.dynamo for frame in captured.frames)]


def assert_sound(graph: Graph) -> None:
    """The text reads back as an equal graph, which prints as equal text; both keep the rules."""
    verify(graph)
    text = print_graph(graph)
    read = parse_graph(text)
    assert read == graph
    assert print_graph(read) == text
    verify(read)


@dataclass
class Checked:
    """A callback of the pass manager that checks each graph it sees, once."""

    seen: int = 0
    last: Graph | None = None

    def __call__(self, moment: str, pass_: Pass, graph: Graph) -> None:
        if graph is not self.last:
            assert_sound(graph)
        self.last = graph
        self.seen += 1


@modes
@pytest.mark.parametrize("name", names)
def test_every_graph_reads_back_equal_around_every_pass(name: str, train: bool) -> None:
    graphs = graphs_of(name, train)
    phases = {graph.phase for graph in graphs}
    assert {"forward", "backward"} <= phases if train else "inference" in phases
    for graph in graphs:
        checked = Checked()
        passes = parse_pipeline(f"{PIPELINE},inline-calls,normalize")
        after = PassManager(passes, callback=checked).run(graph)
        assert checked.seen == 2 * len(passes)
        assert [node.name for node in after.inputs] == [node.name for node in graph.inputs]
        assert len(after.outputs) == len(graph.outputs) and after.saved == graph.saved


@modes
@pytest.mark.parametrize("name", names)
def test_the_texts_in_the_plan_are_sound(name: str, train: bool) -> None:
    texts = planned(name, train).graphs_text
    assert len(texts) == len(planned(name, train).plan.graphs)
    for text in texts.values():
        graph = parse_graph(text)
        assert print_graph(graph) == text
        verify(graph)


def ops_of(graph: Graph) -> Iterator[Node]:
    """Every op, subgraphs' included; not inputs, constants, calls and parts of results."""
    for subgraph in graph.subgraphs.values():
        yield from ops_of(subgraph)
    yield from (node for node in graph.nodes if node.op not in ("input", "constant", "call", "getitem"))


def has_real_line(node: Node) -> bool:
    """Whether the file exists and the line in it is the one that the op shows."""
    location = node.location
    return bool(location.source) and linecache.getline(location.file, location.line).strip() == location.source


@modes
@pytest.mark.parametrize("name", names)
def test_forward_ops_carry_a_real_source_line(name: str, train: bool) -> None:
    """At least 95% of the forward ops of the dumps after all passes; backward ops carry their forward op's."""
    shares = {}
    for text in planned(name, train).graphs_text.values():
        graph = parse_graph(text)
        ops = list(ops_of(graph))
        shares[graph.name] = sum(map(has_real_line, ops)) / len(ops) if ops else 1.0
        if graph.phase == "backward":
            named = sum(bool(node.forward) for node in ops) / len(ops)
            assert named >= 0.9, f"{named:.1%} of {graph.name} name the forward op"
    assert min(shares.values()) >= 0.95, shares
