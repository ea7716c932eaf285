"""What became of each value, read off the graphs before and after real passes."""

from __future__ import annotations

from effcc.inspection.lineage import Fate, fates, scopes
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.passes.manager import PassManager
from effcc.passes.pipeline import parse_pipeline
from fresh_seed import fresh_random
from random_graphs import random_pointwise_graph

SCALED = """graph @scaled phase=inference {
  %x: f32[2,3] = input()  role(input)
  %a: f32[3,2]{1,3} = aten.permute.default(%x, [1, 0])
  %b: f32[3,2]{1,3} = aten.permute.default(%x, [1, 0])
  %s: f32[3,2]{1,3} = aten.add.Tensor(%a, %b)
  %one: f32[3,2]{1,3} = aten.mul.Tensor(%s, 1)
  %unread: f32[2,3] = aten.exp.default(%x)
  %r: f32[3,2]{1,3} = aten.relu.default(%one)
  alias %a of %x
  alias %b of %x
  return (%r)
}
"""

#: Two layers of eight ops each, with a weight of their own.
LAYER = """  %a{n}: f32[4] = aten.mul.Tensor(%{x}, %w{n})
  %b{n}: f32[4] = aten.sin.default(%a{n})
  %c{n}: f32[4] = aten.add.Tensor(%b{n}, %{x})
  %d{n}: f32[4] = aten.exp.default(%c{n})
  %e{n}: f32[4] = aten.neg.default(%d{n})
  %f{n}: f32[4] = aten.cos.default(%e{n})
  %g{n}: f32[4] = aten.mul.Tensor(%f{n}, %a{n})
  %h{n}: f32[4] = aten.tanh.default(%g{n})
"""


def layers(count: int) -> str:
    inputs = ["  %x: f32[4] = input()  role(input)\n"]
    inputs += [f"  %w{n}: f32[4] = input()  role(parameter)\n" for n in range(count)]
    bodies = [LAYER.format(n=n, x="x" if n == 0 else f"h{n - 1}") for n in range(count)]
    return f"graph @tower phase=inference {{\n{''.join(inputs)}{''.join(bodies)}  return (%h{count - 1})\n}}\n"


def after(graph: Graph, pipeline: str) -> Graph:
    return PassManager(parse_pipeline(pipeline)).run(graph)


def test_replaced_unread_and_kept_values() -> None:
    before = parse_graph(SCALED)
    found = fates(before, after(before, "normalize"))
    assert found["", "x"] == Fate("kept", (("", "x"),))
    assert found["", "b"] == Fate("replaced", (("", "a"),))
    assert found["", "one"] == Fate("replaced", (("", "s"),))
    assert found["", "unread"] == Fate("unread")
    assert found["", "r"] == Fate("kept", (("", "r"),))


def test_a_view_that_is_folded_into_its_reader() -> None:
    before = parse_graph("""graph @views phase=inference {
  %x: f32[2,3,5] = input()  role(input)
  %a: f32[3,5,2]{5,1,15} = aten.permute.default(%x, [1, 2, 0])
  %b: f32[5,3,2]{1,5,15} = aten.permute.default(%a, [1, 0, 2])
  %c: f32[5,3,2]{1,5,15} = aten.exp.default(%b)
  alias %a of %x
  alias %b of %a
  return (%c)
}
""")
    changed = after(before, "normalize")
    assert [node.name for node in changed.nodes] == ["x", "b", "c"]
    assert fates(before, changed)["", "a"] == Fate("folded", (("", "b"),))


def test_ops_of_layers_that_become_one_subgraph() -> None:
    before = parse_graph(layers(3))
    changed = after(before, "repeated-structure")
    (inner,) = changed.subgraphs
    found = fates(before, changed)
    for n in range(3):
        for letter in "abcdefgh":
            fate = found["", f"{letter}{n}"]
            assert fate == Fate("moved", ((inner, f"{letter}0"),)), (letter, n, fate)
    back = fates(changed, after(changed, "inline-calls"))
    assert all(back[inner, f"{letter}0"].places for letter in "abcdefgh")


def test_every_value_of_a_random_graph_has_a_fate_that_exists() -> None:
    generator = fresh_random()
    for _ in range(25):
        before = random_pointwise_graph(generator)
        changed = after(before, "normalize,repeated-structure{min_nodes=3},regions,schedule")
        there = {(scope, node.name) for scope, graph in scopes(changed).items() for node in graph.nodes}
        found = fates(before, changed)
        assert found.keys() == {("", node.name) for node in before.nodes}
        read = _needed(before)
        for place, fate in found.items():
            assert set(fate.places) <= there
            assert (fate.how == "unread") == (not fate.places)
            if fate.how == "unread":
                assert place[1] not in read, f"{place} is needed, but nothing is said of it"


def _needed(graph: Graph) -> set[str]:
    nodes = graph.by_name()
    waiting, needed = list(graph.output_names()), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += nodes[name].operands()
    return needed
