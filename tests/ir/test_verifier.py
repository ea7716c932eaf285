"""Each rule of the graph: text that breaks it in, the error out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
from effcc.errors import VerificationError
from effcc.ir.graph import Node, Ref
from effcc.ir.parser import parse_graph
from effcc.ir.rules import RULES
from effcc.ir.types import TensorType
from effcc.ir.verifier import verify

GOOD = """\
graph @g phase=forward saved=1 {
  repeat @layer x 1 digest "0"
  graph @layer phase=forward {
    %i: f32[4] = input()  role(input)
    %r: f32[4] = aten.relu.default(%i)
    return (%r)
  }
  %x: f32[4] = input()  role(input)
  %w: f32[2] = input()  role(parameter)
  %y: f32[4] = aten.relu.default(%x)  loc(model.py:7 "y = relu(x)" in mlp)  region(0)
  %s: (f32[2], f32[2]) = aten.split.Tensor(%y, 2)  region(1)
  %a: f32[2] = getitem(%s, 0)  region(1)
  %c: (f32[4],) = call(@layer, %y)
  %d: f32[4] = getitem(%c, 0)
  alias %s of %y
  alias %a of %s
  return (%d, %a)
}
"""

CASES = [
    ("phase=forward saved=1 {", "phase=sideways saved=1 {", "phase 'sideways' is not known"),
    ("%a: f32[2]", "%y: f32[2]", "%y is defined twice, first by node 2"),
    ("relu.default(%x)", "relu.default(%c)", "%y reads %c, which is defined only later"),
    ("relu.default(%x)", "relu.default(%z)", "%y reads %z, which is not defined"),
    ("return (%d, %a)", "return (%d, %b)", "the graph returns %b, which is not defined"),
    ("saved=1", "saved=3", "saved=3, but the graph has 2 outputs"),
    ("phase=forward saved=1 {", "phase=joint saved=1 {", "saved=1 in a graph of phase joint"),
    ("%w: f32[2] = input()", "%w: f32[2] = input(3)", "input %w has arguments"),
    (
        "  %d: f32[4] = getitem(%c, 0)",
        "  %d: f32[4] = getitem(%c, 0)\n  %late: f32[1] = input()",
        "input %late comes after %y",
    ),
    ("in mlp)", "in mlp) role(input)", "%y has role input but is not an input"),
    ("role(parameter)", "role(weight)", "%w has the unknown role 'weight'"),
    ("%y: f32[4] =", "%y =", "%y has no type"),
    ("%y: f32[4] =", "%y: f32[4]{1,1} =", "has 1 sizes but 2 strides"),
    ("%y: f32[4] =", "%y: f32[-4] =", "has a negative size"),
    ("%y: f32[4] =", "%y: number =", "has the unknown kind 'number'"),
    ("getitem(%s, 0)", "getitem(%s, 2)", "%a reads part 2 of %s, which has 2 parts"),
    ("getitem(%s, 0)", "getitem(%s, -1)", "%a reads part -1 of %s, which has 2 parts"),
    ("getitem(%s, 0)", "getitem(%y, 0)", "%a: %y is no tuple"),
    ("getitem(%s, 0)", "getitem(%s, True)", "getitem takes a value and an integer"),
    ("%a: f32[2] = getitem", "%a: f32[3] = getitem", "%a has type f32[3], but part 0 of %s is f32[2]"),
    ("call(@layer, %y)", "call(@other, %y)", "%c uses @other, which is no subgraph here"),
    ("call(@layer, %y)", "call(@layer)", "%c gives @layer 0 arguments; it has 1 inputs"),
    ("call(@layer, %y)", "call(@layer, %w)", "%c passes %w of type f32[2] for input %i of type f32[4]"),
    ("call(@layer, %y)", "call(%y)", "%c calls no subgraph"),
    ("aten.relu.default(%x)", "effcc.cascade.default(%x)", "names no cascade of this graph"),
    ("%c: (f32[4],)", "%c: (f32[4], f32[4])", "but @layer returns 1 values"),
    ("alias %a of %s", "alias %a of %q", "%q is not defined"),
    ("alias %s of %y", "alias %y of %s", "the base does not come before its alias"),
    ("repeat @layer x 1", "repeat @layer x 2", "the graph calls it 1 times"),
    ("repeat @layer x 1", "repeat @layers x 1", "there is no such subgraph"),
    ("region(1)\n  %a", "region(2)\n  %a", "%a is in region 1, after %s in region 2"),
    ("aten.relu.default(%x)", '"aten..relu"(%x)', "'aten..relu' is not an op's name"),
    ("aten.relu.default(%x)", "aten.relu.default(%x, k=1, k=2)", "is given a named argument twice"),
    ("%y: f32[4] =", "%y: f32[4] = constant(3)\n  %v: f32[4] =", "constant %y has no name"),
]


def test_the_good_graph_passes() -> None:
    verify(parse_graph(GOOD))


@pytest.mark.parametrize(("before", "after", "expected"), CASES)
def test_each_rule(before: str, after: str, expected: str) -> None:
    assert before in GOOD
    with pytest.raises(VerificationError) as caught:
        verify(parse_graph(GOOD.replace(before, after, 1)))
    assert expected in str(caught.value)
    assert caught.value.remedy, "says what to do"


def test_every_rule_has_a_case() -> None:
    broken = set()
    for before, after, _ in CASES:
        graph = parse_graph(GOOD.replace(before, after, 1))
        for rule in RULES:
            try:
                found = next(iter(rule(graph)), None)
            except KeyError:  # a later rule relies on earlier ones
                continue
            if found is not None:
                broken.add(rule.__name__)
                break
    assert {rule.__name__ for rule in RULES} - broken == {"arguments_are_sound"} - broken


def test_shows_ten_lines_and_the_users_line() -> None:
    lines = [f"  %n{i}: f32[1] = aten.relu.default(%{'x' if i == 0 else f'n{i - 1}'})" for i in range(40)]
    lines[20] = '  %n20: f32[1] = aten.relu.default(%nowhere)  loc(model.py:7 "y = relu(x)" in mlp)'
    text = "graph @g phase=joint {\n  %x: f32[1] = input()\n" + "\n".join(lines) + "\n  return ()\n}\n"
    with pytest.raises(VerificationError) as caught:
        verify(parse_graph(text))
    shown = [line for line in str(caught.value).splitlines() if " = " in line]
    assert len(shown) == 11
    assert [line for line in shown if line.startswith(">")] == [shown[5]] and "%nowhere" in shown[5]
    assert "%n15" in shown[0] and "%n25" in shown[10]
    assert caught.value.where == "model.py:7 in mlp"


def test_subgraphs_are_verified() -> None:
    with pytest.raises(VerificationError, match="graph @layer: %r reads %q"):
        verify(parse_graph(GOOD.replace("relu.default(%i)", "relu.default(%q)")))


def test_foreign_objects_are_refused() -> None:
    graph = parse_graph(GOOD)

    def changed(node: Node) -> None:
        verify(replace(graph, nodes=tuple(node if old.name == node.name else old for old in graph.nodes)))

    y = graph.by_name()["y"]
    with pytest.raises(VerificationError, match="class object, which the IR does not have"):
        changed(replace(y, args=(Ref("x"), object())))  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match="not canonical"):
        changed(replace(y, type=TensorType("f32", (sympy.Symbol("s0", positive=True),))))
    with pytest.raises(VerificationError, match="unknown dtype 'f31'"):
        changed(replace(y, type=TensorType("f31", (4,))))
    with pytest.raises(VerificationError, match="does not know zeta"):
        changed(replace(y, args=(Ref("x"), sympy.zeta(sympy.Symbol("s0", integer=True)))))
