"""What the structural hash sees, what it does not, and how repeated layers are found."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from effcc.ir.graph import Graph, Location, Node, Ref
from effcc.ir.parser import parse_graph
from effcc.ir.structural_hash import Run, find_repeats, first_difference, graph_hash, op_hashes
from effcc.ir.types import TensorType
from work import calls_made

TEXT = """\
graph @g phase=joint {
  graph @body phase=joint {
    %i: f32[s0,4]@cuda:0 = input()
    %j: f32[s0,4]@cuda:0 = aten.relu.default(%i)
    return (%j)
  }
  %x: f32[s0,4]{1,s0}@cuda:0 = input()  role(input)
  %z: f32[4]@cuda:0 = aten.zeros.default([4], dtype=torch.float32, device=device(cuda:0))
  %y: f32[s0,4]@cuda:0 = aten.add.Tensor(%x, %z, alpha=2)  loc(model.py:3 "y = x + 2 * z" in mlp)
  %c: (f32[s0,4]@cuda:0,) = call(@body, %y)
  %o: f32[s0,4]@cuda:0 = getitem(%c, 0)
  return (%o)
}
"""


@pytest.mark.parametrize(
    "change",
    [
        lambda text: re.sub(r"@cuda:0", "", text).replace("device(cuda:0)", "device(cpu)"),
        lambda text: text.replace("%y", "%renamed"),
        lambda text: text.replace("s0", "s77"),
        lambda text: text.replace("@body", "@layer_3").replace("@g ", "@other "),
        lambda text: re.sub(r"  loc\(.*\)", "", text),
    ],
)
def test_names_devices_and_source_lines_do_not_count(change: Callable[[str], str]) -> None:
    changed = parse_graph(change(TEXT))
    assert changed != parse_graph(TEXT)
    assert graph_hash(changed) == graph_hash(parse_graph(TEXT))
    assert first_difference(op_hashes(parse_graph(TEXT)), changed) is None


@pytest.mark.parametrize(
    ("before", "after", "first"),
    [
        ("aten.add.Tensor", "aten.sub.Tensor", "y"),
        ("alpha=2", "alpha=2.0", "y"),
        ("(%x, %z, alpha", "(%x, %x, alpha", "y"),
        ("%z: f32[4]", "%z: f32[5]", "z"),
        ("torch.float32", "torch.float64", "z"),
        ("%x: f32[s0,4]{1,s0}", "%x: f32[s0,4]", "x"),
        ("aten.relu.default", "aten.gelu.default", "c"),
        ("%o: f32[s0,4]", "%o: f64[s0,4]", "o"),
    ],
)
def test_structure_counts_and_the_first_difference_is_named(before: str, after: str, first: str) -> None:
    changed = parse_graph(TEXT.replace(before, after))
    assert graph_hash(changed) != graph_hash(parse_graph(TEXT))
    found = first_difference(op_hashes(parse_graph(TEXT)), changed)
    assert found is not None and found.name == first


def test_shorter_and_longer_graphs_differ() -> None:
    graph = parse_graph(TEXT)
    shorter = replace(graph, nodes=graph.nodes[:-1], outputs=())
    assert first_difference(op_hashes(graph), shorter) == shorter.nodes[-1]
    assert first_difference(op_hashes(shorter), graph) == graph.nodes[-1]


def test_outputs_and_aliases_count() -> None:
    graph = parse_graph(TEXT)
    assert graph_hash(replace(graph, outputs=(Ref("y"),))) != graph_hash(graph)
    assert graph_hash(parse_graph(TEXT.replace("  return (%o)", "  alias %o of %y\n  return (%o)"))) != graph_hash(
        graph
    )


# Repeats -------------------------------------------------------------------------------------------------------------

F32 = TensorType("f32", (4, 4))


def layered(layers: int, length: int, *, weights: int = 3, backward: bool = True, seed: int = 7) -> Graph:
    """A graph like a transformer's training step: a stem, equal layers, a head, the layers backward, an end."""
    inputs = [Node("x", "input", type=F32, role="input")]
    inputs += [Node(f"w{n}_{i}", "input", type=F32, role="parameter") for n in range(layers) for i in range(weights)]
    nodes: list[Node] = []

    def add(op: str, *operands: str, module: str) -> str:
        name = f"n{len(nodes)}"
        location = Location("model.py", 1, "", module)
        nodes.append(Node(name, op, tuple(Ref(operand) for operand in operands), type=F32, location=location))
        return name

    value = add("aten.tanh.default", add("aten.exp.default", "x", module="stem"), module="stem")
    saved: list[list[str]] = []
    for layer in range(layers):
        made = [value]
        for i in range(length):
            other = f"w{layer}_{i % weights}" if i % 3 == 0 else made[-1 - (i * seed) % min(len(made), 5)]
            made.append(add(f"aten.op{(i * i + seed) % 11}.default", made[-1], other, module=f"layers.{layer}.mlp"))
        value = made[-1]
        saved.append(made[1:])
    value = add("aten.sum.default", value, module="head")
    for layer in reversed(range(layers if backward else 0)):
        for i in reversed(range(length)):
            value = add(f"aten.back{i % 7}.default", value, saved[layer][i], module=f"layers.{layer}.mlp")
    value = add("aten.neg.default", value, module="end")
    return Graph("g", "joint", (*inputs, *nodes), (Ref(value),))


def test_finds_layers_forward_and_backward() -> None:
    graph = layered(layers=5, length=20)
    start = len(graph.inputs)
    assert find_repeats(graph) == (Run(start + 2, 20, 5), Run(start + 2 + 100 + 1, 20, 5))


def test_a_different_layer_splits_the_run() -> None:
    graph = layered(layers=7, length=20, backward=False)
    start = len(graph.inputs) + 2
    odd = start + 3 * 20 + 10
    nodes = tuple(replace(node, op="aten.odd.default") if i == odd else node for i, node in enumerate(graph.nodes))
    runs = find_repeats(replace(graph, nodes=nodes))
    assert sorted((run.length, run.count) for run in runs) == [(20, 3), (20, 3)]
    assert all(run.end <= odd or run.start > odd for run in runs)


def test_equal_ops_with_other_data_flow_are_no_repeat() -> None:
    graph = layered(layers=2, length=20, backward=False)
    start = len(graph.inputs) + 2
    other = start + 20 + 12
    moved = replace(graph.nodes[other], args=(graph.nodes[other].args[0], Ref(graph.nodes[start + 20].name)))
    assert graph.nodes[other] != moved
    changed = replace(graph, nodes=(*graph.nodes[:other], moved, *graph.nodes[other + 1 :]))
    assert all(run.length < 20 for run in find_repeats(changed))


def test_short_stretches_are_left_alone() -> None:
    graph = layered(layers=5, length=7, backward=False)
    assert all(run.length >= 8 for run in find_repeats(graph, min_nodes=8))
    assert (Run(len(graph.inputs) + 2, 7, 5),) == find_repeats(graph, min_nodes=7)


def test_126_layers() -> None:
    graph = layered(layers=126, length=118)
    assert len(graph.nodes) > 30_000
    runs = find_repeats(graph)
    assert [(run.length, run.count) for run in runs] == [(118, 126), (118, 126)]


def test_work_grows_with_the_graphs_size() -> None:
    """Eight times the layers are less than twelve times the work."""
    few, many = layered(layers=4, length=60), layered(layers=32, length=60)
    assert calls_made(lambda: find_repeats(many)) < 12 * calls_made(lambda: find_repeats(few))
