"""Regions, their graphs and their order: text IR in, what belongs together out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from effcc.errors import ScheduleError
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.ir.verifier import verify
from effcc.passes.regions import Regions, region_graph
from effcc.passes.schedule import Schedule, units_of

TEXT = """
graph @g phase=inference {
  graph @layer phase=inference {
    %x: f32[4] = input()
    %y: f32[4] = aten.cos.default(%x)
    return (%y)
  }
  %p: f32[4] = input() role(parameter)
  %a: f32[4] = aten.exp.default(%p)
  %b: f32[4] = aten.neg.default(%a)
  %c: (f32[4]) = call(@layer, %b)
  %d: f32[4] = getitem(%c, 0)
  %e: f32[4] = aten.add.Tensor(%d, %a)
  %m: (f32[], i64[]) = aten.max.dim(%e, 0)
  %v: f32[] = getitem(%m, 0)
  %l: f32[4] = mylib.custom.default(%e)
  %f: f32[4] = _c10d_functional.wait_tensor.default(%l)
  %n: i64[s0, 1] = aten.nonzero.default(%f)
  %h: f32[4] = aten.mul.Tensor(%f, %v)
  return (%h, %n)
}
"""


def numbers(graph: Graph) -> dict[str, int | None]:
    return {node.name: node.region for node in graph.nodes}


def test_runs_between_calls_and_lone_ops() -> None:
    graph = Regions().apply(parse_graph(TEXT))
    verify(graph)
    assert numbers(graph) == {
        "p": None, "a": 0, "b": 0, "c": None, "d": None, "e": 1, "m": 1, "v": 1, "l": 1, "f": 2, "n": 3, "h": 4,
    }  # fmt: skip
    assert numbers(graph.subgraphs["layer"]) == {"x": None, "y": 0}


def test_named_ops_stand_alone_and_the_pass_is_stable() -> None:
    graph = Regions(alone=("aten.neg",)).apply(parse_graph(TEXT))
    assert [graph.by_name()[name].region for name in "ab"] == [0, 1]
    assert Regions(alone=("aten.neg",)).apply(graph) is graph


def test_units_in_order() -> None:
    units = units_of(Regions().apply(parse_graph(TEXT)))
    assert [(u.kind, [n.name for n in u.nodes]) for u in units] == [
        ("region", ["a", "b"]),
        ("call", ["c"]),
        ("region", ["e", "m", "v", "l"]),
        ("region", ["f"]),
        ("region", ["n"]),
        ("region", ["h"]),
    ]


def test_region_as_a_graph_has_its_reads_as_inputs_and_its_uses_as_outputs() -> None:
    graph = Regions().apply(parse_graph(TEXT))
    units = units_of(graph)
    first = region_graph(graph, units[0].nodes, "r")
    verify(first)
    assert [n.name for n in first.inputs] == ["p"] and first.inputs[0].role == "parameter"
    assert first.output_names() == ["a", "b"]
    second = region_graph(graph, units[2].nodes, "r")
    assert [n.name for n in second.inputs] == ["d", "a"]
    assert second.output_names() == ["v", "l"]


INTERLEAVED = """
graph @g phase=inference {
  graph @layer phase=inference {
    %x: f32[4] = input()
    return (%x)
  }
  %p: f32[4] = input()
  %a: f32[4] = aten.exp.default(%p)
  %c: (f32[4]) = call(@layer, %p)
  %b: f32[4] = aten.neg.default(%a)
  %d: f32[4] = getitem(%c, 0)
  %e: f32[4] = aten.add.Tensor(%d, %b)
  return (%e)
}
"""


def with_regions(text: str, **regions: int) -> Graph:
    graph = parse_graph(text)
    return graph.with_nodes(tuple(replace(n, region=regions.get(n.name)) for n in graph.nodes))


def test_schedule_brings_a_region_together() -> None:
    graph = Schedule().apply(with_regions(INTERLEAVED, a=0, b=0, e=1))
    verify(graph)
    assert [n.name for n in graph.nodes] == ["p", "a", "b", "c", "d", "e"]
    assert Schedule().apply(graph) is graph


def test_a_region_around_what_it_waits_for_is_refused() -> None:
    with pytest.raises(ScheduleError, match="region 0"):
        Schedule().apply(with_regions(INTERLEAVED, a=0, b=0, e=0).with_nodes(
            tuple(
                replace(n, args=(n.args[0], parse_graph(INTERLEAVED).nodes[3].args[0])) if n.name == "c" else n
                for n in with_regions(INTERLEAVED, a=0, b=0, e=0).nodes
            )
        ))  # fmt: skip


def test_a_write_stays_behind_the_reads_of_what_it_overwrites() -> None:
    text = """
    graph @g phase=inference {
      %p: f32[4] = input()
      %a: f32[4] = aten.exp.default(%p)
      %w: f32[4] = aten.copy_.default(%p, %a)
      %b: f32[4] = aten.neg.default(%a)
      return (%b)
    }
    """
    graph = with_regions(text, a=0, w=1, b=0)
    assert [n.name for n in Schedule().apply(graph).nodes] == ["p", "a", "b", "w"]
    read_later = with_regions(text.replace("neg.default(%a)", "neg.default(%p)"), a=0, w=1, b=0)
    with pytest.raises(ScheduleError):
        Schedule().apply(read_later)
