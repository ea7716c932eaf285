"""Layers become one subgraph: text in, text out; inlining gives the graph back; results are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from effcc.frontend.fx_import import from_fx
from effcc.ir.graph import Graph, Node
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.ir.structural_hash import first_difference, graph_hash, op_hashes
from effcc.ir.verifier import verify
from effcc.passes.inline_calls import InlineCalls
from effcc.passes.repeated_structure import RepeatedStructure
from fx_captures import BY_DEFAULT, MODELS, graphs_of
from some_by_default import some_by_default

FLAT = """\
graph @g phase=inference {
  %x: f32[4,4] = input()  role(input)
  %w0: f32[4,4] = input()  role(parameter)
  %w1: f32[4,4] = input()  role(parameter)
  %a: f32[4,4] = aten.mm.default(%x, %w0)  loc(m.py:3 "a" in layers.0.up)
  %b: f32[4,4] = aten.relu.default(%a)  loc(m.py:4 "b" in layers.0)
  %c: f32[4,4] = aten.mm.default(%b, %w1)  loc(m.py:3 "a" in layers.1.up)
  %d: f32[4,4] = aten.relu.default(%c)  loc(m.py:4 "b" in layers.1)
  %e: f32[4,4] = aten.neg.default(%d)
  return (%e)
}
"""

OUTLINED = """\
graph @g phase=inference {
  repeat @repeat_0 x 2 digest "DIGEST"
  graph @repeat_0 phase=inference {
    %x: f32[4,4] = input()  role(input)
    %w0: f32[4,4] = input()  role(input)
    %a: f32[4,4] = aten.mm.default(%x, %w0)  loc(m.py:3 "a" in layers.0.up)
    %b: f32[4,4] = aten.relu.default(%a)  loc(m.py:4 "b" in layers.0)
    return (%b)
  }
  %x: f32[4,4] = input()  role(input)
  %w0: f32[4,4] = input()  role(parameter)
  %w1: f32[4,4] = input()  role(parameter)
  %repeat_0_call: (f32[4,4],) = call(@repeat_0, %x, %w0)  loc(m.py:4 "b" in layers.0)
  %b: f32[4,4] = getitem(%repeat_0_call, 0)  loc(m.py:4 "b" in layers.0)
  %repeat_0_call_1: (f32[4,4],) = call(@repeat_0, %b, %w1)  loc(m.py:4 "b" in layers.1)
  %d: f32[4,4] = getitem(%repeat_0_call_1, 0)  loc(m.py:4 "b" in layers.1)
  %e: f32[4,4] = aten.neg.default(%d)
  return (%e)
}
"""


def test_two_layers() -> None:
    graph = RepeatedStructure(min_nodes=2).apply(parse_graph(FLAT))
    verify(graph)
    assert print_graph(graph) == OUTLINED.replace("DIGEST", graph_hash(graph.subgraphs["repeat_0"]))


def test_inlining_gives_names_and_source_lines_back() -> None:
    graph = InlineCalls().apply(parse_graph(OUTLINED))
    verify(graph)
    # Only values that no getitem named have a name of their own: here the second layer's %a.
    assert print_graph(graph) == FLAT.replace("%c", "%a_1")


def test_graphs_without_repeats_or_calls_are_left_alone() -> None:
    flat = parse_graph(FLAT)
    assert RepeatedStructure(min_nodes=3).apply(flat) == flat
    assert InlineCalls().apply(flat) == flat


def test_values_shared_by_all_layers_are_one_input() -> None:
    graph = RepeatedStructure(min_nodes=2).apply(parse_graph(FLAT.replace("%b, %w1", "%b, %w0")))
    verify(graph)
    assert [len(node.args) for node in graph.nodes if node.op == "call"] == [3, 3]
    mask = FLAT.replace("aten.relu.default(%a)", "aten.mul.Tensor(%a, %w0)").replace(
        "relu.default(%c)", "mul.Tensor(%c, %w1)"
    )
    graph = RepeatedStructure(min_nodes=2).apply(parse_graph(mask))
    assert [len(node.args) for node in graph.nodes if node.op == "call"] == [3, 3], "one weight, read twice"
    uneven = mask.replace("mul.Tensor(%c, %w1)", "mul.Tensor(%c, %w0)")
    graph = RepeatedStructure(min_nodes=2).apply(parse_graph(uneven))
    assert [len(node.args) for node in graph.nodes if node.op == "call"] == [4, 4], "two values in the second layer"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("%c: f32[4,4]", "%c: f64[4,4]"),
        ("aten.relu.default(%c)", "aten.gelu.default(%c)"),
        ("%w1: f32[4,4]", "%w1: f32[4,4]{1,4}"),
        ("mm.default(%b, %w1)", "mm.default(%w1, %w1)"),
    ],
)
def test_layers_that_differ_stay(before: str, after: str) -> None:
    changed = parse_graph(FLAT.replace(before, after))
    result = RepeatedStructure(min_nodes=2).apply(changed)
    verify(result)
    inlined = InlineCalls().apply(result)
    assert graph_hash(inlined) == graph_hash(changed)
    if "%w1, %w1" not in after:
        assert result == changed


def test_mutation_hazards_are_not_outlined() -> None:
    """%b is a view of %a, which is written behind the layers: a call would hide that %b changes too."""
    text = FLAT.replace("aten.relu", "aten.alias").replace(
        "  %e: f32[4,4] = aten.neg.default(%d)\n",
        "  %e: f32[4,4] = aten.add_.Tensor(%a, 1)\n  alias %b of %a\n  alias %d of %c\n  alias %e of %a writes\n",
    )
    graph = parse_graph(text)
    verify(graph)
    assert RepeatedStructure(min_nodes=2).apply(graph) == graph
    harmless = parse_graph(
        text.replace("  alias %e of %a writes\n", "").replace("add_.Tensor(%a, 1)", "neg.default(%d)")
    )
    outlined = RepeatedStructure(min_nodes=2).apply(harmless)
    assert outlined.subgraphs and {alias.name for alias in outlined.subgraphs["repeat_0"].aliases} == {"b"}
    assert graph_hash(InlineCalls().apply(outlined)) == graph_hash(harmless)


def test_results_that_are_views_of_inputs_say_so() -> None:
    text = FLAT.replace("aten.mm.default(%x, %w0)", "aten.t.default(%x)").replace(
        "aten.mm.default(%b, %w1)", "aten.t.default(%b)"
    )
    text = text.replace("aten.relu", "aten.alias").replace(
        "  return", "  alias %a of %x\n  alias %b of %a\n  alias %c of %b\n  alias %d of %c\n  return"
    )
    graph = parse_graph(text)
    outlined = RepeatedStructure(min_nodes=2).apply(graph)
    verify(outlined)
    assert {(alias.name, alias.base) for alias in outlined.aliases} == {("b", "x"), ("d", "b")}
    assert graph_hash(InlineCalls().apply(outlined)) == graph_hash(graph)


def without_names(graph: Graph) -> list:
    """Nodes with everything but names: operands by position."""
    position = {node.name: f"%{index}" for index, node in enumerate(graph.nodes)}
    return [
        replace(node, name="", args=tuple(position[name] for name in node.operands()), kwargs=(), forward="")
        for node in graph.nodes
    ]


def without_module(node: Node) -> Node:
    return replace(node, location=replace(node.location, module="") if node.location else None)


@pytest.mark.parametrize("model", some_by_default(MODELS, BY_DEFAULT - {"llama_dynamic"}))
def test_inline_of_outline_is_the_same_graph(model: str) -> None:
    outlined_one = False
    for one in graphs_of(model):
        graph = from_fx(one.gm, one.model, one.phase, forward=one.forward)
        outlined = RepeatedStructure().apply(graph)
        verify(outlined)
        assert parse_graph(print_graph(outlined)) == outlined
        inlined = InlineCalls().apply(outlined)
        verify(inlined)
        assert first_difference(op_hashes(graph), inlined) is None
        assert graph_hash(inlined) == graph_hash(graph)
        before, after = without_names(graph), without_names(inlined)
        assert [without_module(node) for node in after] == [without_module(node) for node in before]
        # An op between two layers may go by its neighbour's path: it has no place of its own within the layer.
        strayed = sum(a.location != b.location for a, b in zip(before, after, strict=True))
        assert strayed <= len(before) / 20, f"{strayed} of {len(before)} ops have another module path"
        outlined_one |= bool(outlined.repeats)
    assert outlined_one or model == "t5", "two T5 layers differ: the first makes the position bias"


@pytest.mark.parametrize(
    ("model", "layers"),
    some_by_default(
        [("llama", 3), ("gpt2", 3), ("vit", 3), ("mixtral", 2), ("conv", 3)],
        {("llama", 3), ("conv", 3)},
    ),
)
def test_a_models_layers_are_found_forward_and_backward(model: str, layers: int) -> None:
    one = next(one for one in graphs_of(model) if one.phase == "joint")
    outlined = RepeatedStructure().apply(from_fx(one.gm, model, "joint"))
    assert [repeat.count for repeat in outlined.repeats] == [layers, layers]


def test_a_subgraph_that_is_called_twice_already_is_counted() -> None:
    text = """graph @g phase=inference {
  graph @layer phase=inference {
    %x: f32[4] = input()  role(input)
    %a: f32[4] = aten.exp.default(%x)
    return (%a)
  }
  graph @once phase=inference {
    %x: f32[4] = input()  role(input)
    return (%x)
  }
  %x: f32[4] = input()  role(input)
  %one: (f32[4],) = call(@layer, %x)
  %a: f32[4] = getitem(%one, 0)
  %two: (f32[4],) = call(@layer, %a)
  %b: f32[4] = getitem(%two, 0)
  %three: (f32[4],) = call(@once, %b)
  %c: f32[4] = getitem(%three, 0)
  return (%c)
}
"""
    graph = parse_graph(text)
    counted = RepeatedStructure().apply(graph)
    assert [(repeat.name, repeat.count) for repeat in counted.repeats] == [("layer", 2)]
    assert counted.repeats[0].digest == graph_hash(graph.subgraphs["layer"])
    assert replace(counted, repeats=()) == graph
    verify(counted)
    assert RepeatedStructure().apply(counted) == counted
