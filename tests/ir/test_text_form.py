"""The text form: what it looks like, that it reads back exactly, and that bad text gives a good error alone."""

from __future__ import annotations

import math

import pytest
import sympy
from effcc.errors import EffccError, ParseError, VerificationError
from effcc.ir.expressions import FUNCTIONS, ExpressionError, canonical, print_expression, symbol
from effcc.ir.graph import Alias, Graph, Location, Node, Ref, Repeat, Symbol, argument_key
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph, print_node
from effcc.ir.types import DTYPES, NoneType, OpaqueType, ScalarType, TensorType, TupleType
from effcc.ir.verifier import verify
from fresh_seed import fresh_random
from hypothesis import given, settings
from hypothesis import strategies as st

S0, S1, U0 = symbol("s0"), symbol("s1"), symbol("u0")

EXAMPLE = """\
graph @step phase=forward saved=1 {
  repeat @layer x 2 digest "00ff"
  graph @layer phase=forward {
    %x: bf16[8,2*s0 + 1] = input()  role(input)
    %y: bf16[8,2*s0 + 1] = aten.relu.default(%x)  loc(model.py:88 "h = self.up(x)" in layers.0.mlp)
    return (%y)
  }
  %p: bf16[8,2*s0 + 1] = input()  role(input)
  %c: (bf16[8,2*s0 + 1],) = call(@layer, %p)
  %a: bf16[8,2*s0 + 1] = getitem(%c, 0)
  %d: (bf16[8,2*s0 + 1],) = call(@layer, %a)
  %b: bf16[8,2*s0 + 1] = getitem(%d, 0)  from("remat(%9)")  region(3)
  %t: bf16[2*s0 + 1,8]{1,2*s0 + 1}@cuda:0 = aten.t.default(%b)  forward(%b)
  alias %t of %b
  return (%a, %t)
}
"""


def test_reads_and_prints_the_same_text() -> None:
    graph = parse_graph(EXAMPLE)
    assert print_graph(graph) == EXAMPLE
    verify(graph)
    assert graph.subgraphs["layer"].nodes[1].location == Location("model.py", 88, "h = self.up(x)", "layers.0.mlp")
    assert graph.nodes[-1].type == TensorType("bf16", (2 * S0 + 1, 8), "cuda:0", (1, 2 * S0 + 1))
    assert graph.aliases == (Alias("t", "b"),) and graph.repeats == (Repeat("layer", 2, "00ff"),)


def test_comments_and_blank_lines_are_skipped() -> None:
    commented = "# a comment\n" + EXAMPLE.replace("%c: (", "\n# why\n  %c: (").replace("region(3)", "region(3) # note")
    assert parse_graph(commented) == parse_graph(EXAMPLE)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (Ref("x"), "%x"),
        (Ref("odd name"), '%"odd name"'),
        (3, "3"),
        (True, "True"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (complex(1, -0.0), "complex(1.0, -0.0)"),
        ('a"b\\\n\u2028\ud800é', '"a\\"b\\\\\\n\\u2028\\ud800é"'),
        (None, "None"),
        ((), "[]"),
        ((1, (2,)), "[1, [2]]"),
        (Symbol("torch.float32"), "torch.float32"),
        (Symbol("device(cuda:0)"), "device(cuda:0)"),
        (Symbol("..."), 'symbol("...")'),
        ((Symbol("slice"), None, 3, None), "[slice, None, 3, None]"),
        (2 * S0 + 1, "2*s0 + 1"),
        (-S0, "-s0"),
        (S0 - S1, "s0 - s1"),
        (3 * S0 / 2, "3*s0/2"),
        (S0**2 * S1, "s0**2*s1"),
        (1 / S0, "s0**(-1)"),
        (S1 * (S0 + 1), "s1*(s0 + 1)"),
        (FUNCTIONS["FloorDiv"](S0 + 7, 8), "FloorDiv(s0 + 7, 8)"),
        (FUNCTIONS["Max"](1, U0), "Max(1, u0)"),
        (sympy.Eq(S0, 3), "Eq(s0, 3)"),
        (symbol("nan"), '$"nan"'),
        (sympy.oo, "oo"),
        (-sympy.oo, "-oo"),
    ],
)
def test_arguments(argument: object, text: str) -> None:
    node = Node("y", "f.g.h", (argument,), (("k", argument),))
    assert print_node(node) == f"%y = f.g.h({text}, k={text})"
    graph = Graph("g", "joint", (node,), (argument,))
    assert parse_graph(print_graph(graph)) == graph


def test_numbers_that_python_takes_for_equal_are_told_apart() -> None:
    def graph(argument: object) -> Graph:
        return Graph("g", "joint", (Node("y", "f.g.h", (argument,)),), ())

    different = [1, True, 1.0, complex(1, 0), "1", (1,), 0.0, -0.0, 0, False, None]
    for i, left in enumerate(different):
        for j, right in enumerate(different):
            assert (graph(left) == graph(right)) == (i == j), (left, right)
    assert graph(math.nan) == graph(float("nan"))


# Properties ----------------------------------------------------------------------------------------------------------

names = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(
    ["x", "mul_1", "a.b", "in", "return", "%", "@"]
)
symbols = st.sampled_from([S0, S1, U0, symbol("inf"), symbol("odd name"), symbol("zf0")])


def _extend(inner: st.SearchStrategy) -> st.SearchStrategy:
    small = st.integers(-9, 9)
    divided = st.builds(lambda a, b: FUNCTIONS["FloorDiv"](a, b), inner, st.integers(2, 9))
    binary = st.sampled_from(["Mod", "CleanDiv", "CeilDiv", "PythonMod", "PowByNatural", "IntTrueDiv", "Max", "Min"])
    return st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner | small),
        st.builds(lambda a, b: a / b, inner, st.integers(2, 9)),
        st.builds(lambda a, b: sympy.Mul(b, a, evaluate=False), inner, st.integers(2, 9)),
        st.builds(lambda a, n: a**n, symbols, st.integers(-2, 3)),
        divided,
        st.builds(lambda f, a, b: FUNCTIONS[f](a, b), binary, inner, inner),
        st.builds(lambda a, b, c: FUNCTIONS["ModularIndexing"](a, b, c), inner, small, symbols),
        st.builds(lambda a: FUNCTIONS["CeilToInt"](a / 2), inner),
    )


def _canonical(expression: object) -> object:
    try:
        return canonical(expression)
    except ExpressionError:
        return 1


expressions = st.recursive(symbols, _extend, max_leaves=6).map(_canonical)
sizes = st.integers(0, 1 << 40) | expressions.filter(lambda size: not isinstance(size, float) and size is not sympy.nan)
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | names
    | st.builds(Ref, names)
    | st.builds(Symbol, names | st.sampled_from(["torch.float32", "@a", "dict", "device(cpu)", "torch", "slice "]))
    | expressions
)
arguments = st.recursive(plain, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@st.composite
def tensor_types(draw: st.DrawFn) -> TensorType:
    shape = tuple(draw(st.lists(sizes, max_size=3)))
    stride = tuple(draw(sizes) for _ in shape) if draw(st.booleans()) else None
    device = draw(st.sampled_from(["cpu", "cuda:0", "meta"]) | names)
    return TensorType(draw(st.sampled_from(sorted(DTYPES))), shape, device, stride)


types = st.recursive(
    tensor_types()
    | st.just(NoneType())
    | st.builds(OpaqueType, names)
    | st.builds(ScalarType, st.sampled_from(["int", "float", "bool"]), st.none() | sizes),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: TupleType(tuple(items))),
    max_leaves=4,
)
nodes = st.builds(
    Node,
    name=names,
    op=names,
    args=st.lists(arguments, max_size=3).map(tuple),
    kwargs=st.lists(st.tuples(names, arguments), max_size=2).map(tuple),
    type=st.none() | types,
    location=st.builds(Location, names, st.integers(0, 10**9), names, names),
    role=names,
    forward=names,
    origin=names,
    region=st.none() | st.integers(0, 10**9),
)


def _graphs(subgraphs: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(
        Graph,
        name=names,
        phase=names,
        nodes=st.lists(nodes, max_size=2).map(tuple),
        outputs=st.lists(arguments, max_size=2).map(tuple),
        saved=st.integers(0, 9),
        subgraphs=subgraphs,
        aliases=st.lists(st.builds(Alias, names, names, st.booleans()), max_size=2).map(tuple),
        repeats=st.lists(st.builds(Repeat, names, st.integers(0, 999), names), max_size=2).map(tuple),
    )


graphs = _graphs(st.dictionaries(names, _graphs(st.just({})), max_size=1))


@settings(max_examples=150, deadline=None)
@given(graphs)
def test_any_graph_reads_back_equal(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse_graph(text)
    assert again == graph
    assert print_graph(again) == text


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_any_expression_reads_back_equal(expression: object) -> None:
    graph = Graph("g", "joint", (), (expression,))
    read = parse_graph(print_graph(graph)).outputs[0]
    assert argument_key(read) == argument_key(expression), print_expression(expression)


@settings(max_examples=100, deadline=None)
@given(expressions.filter(lambda e: isinstance(e, sympy.Expr)), st.integers(2, 50), st.integers(2, 50))
def test_expressions_keep_their_value(expression: sympy.Expr, first: int, second: int) -> None:
    read = parse_graph(print_graph(Graph("g", "joint", (), (expression,)))).outputs[0]
    values = {S0: first, S1: second, U0: 3}
    assert read.subs(values) == expression.subs(values)


# Torch's own expressions ---------------------------------------------------------------------------------------------


def test_torch_functions_have_twins_with_the_same_values() -> None:
    functions = pytest.importorskip("torch.utils._sympy.functions")
    a, b = sympy.Symbol("s0", integer=True, positive=True), sympy.Symbol("s1", integer=True, positive=True)
    cases = [
        functions.FloorDiv(a * 3 + b, 4),
        functions.ModularIndexing(a, 2, b),
        functions.Mod(a + b, 7),
        functions.PythonMod(a - b, 5),
        functions.CleanDiv(a * 6, b),
        functions.CeilToInt(functions.IntTrueDiv(a, b)),
        functions.FloorToInt(functions.IntTrueDiv(a, b)),
        functions.TruncToInt(functions.IntTrueDiv(a, b)),
        functions.PowByNatural(a, 3),
        functions.Max(a, b, 5),
        functions.Min(a, b + 2),
        functions.LShift(a, 2),
        functions.RShift(a, 2),
        sympy.Eq(a, b),
        (a + 1) * (b - 2) / 2,
    ]
    for case in cases:
        neutral = canonical(case)
        graph = Graph("g", "joint", (), (neutral,))
        assert parse_graph(print_graph(graph)) == graph
        assert not any(type(part).__module__.startswith("torch") for part in sympy.preorder_traversal(neutral))
        for first, second in ((6, 3), (7, 2), (12, 6)):
            theirs = case.subs({a: first, b: second})
            assert neutral.subs({S0: first, S1: second}) == theirs, (case, first, second)


def test_unknown_function_is_refused_by_name() -> None:
    with pytest.raises(ExpressionError, match="zeta"):
        canonical(sympy.zeta(S0))


# Bad text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("aten.t.default(%b)", "aten.t.default(%b", "line 13, column 64"),
        ("bf16[2*s0 + 1,8]", "bf17[2*s0 + 1,8]", "there is no dtype 'bf17'"),
        ("2*s0 + 1,8]", "2*s0 + ,8]", "expected a value"),
        ("2*s0 + 1,8]", "zeta(s0),8]", "there is no function 'zeta'"),
        ("2*s0 + 1,8]", "9**9**9,8]", "write a power of a power with brackets"),
        ("2*s0 + 1,8]", "9**(9**9),8]", "a power is too large"),
        ("forward(%b)", "forward(%b) forward(%b)", "'forward' is given twice"),
        ('"h = self.up(x)"', '"h = self.up(x)', "the string is not closed on its line"),
        ("  graph @layer", "  graph @layer phase=joint { return () }\n  graph @layer", "two subgraphs called @layer"),
        (
            "return (%a, %t)",
            "returns (%a, %t)",
            "expected '%name = op(...)', 'alias', 'repeat', 'cascade', 'graph' or 'return'",
        ),
    ],
)
def test_errors_show_the_place(before: str, after: str, expected: str) -> None:
    text = (
        EXAMPLE.replace(before, after, 1)
        if before != "2*s0 + 1,8]"
        else EXAMPLE.replace(f"bf16[{before}", f"bf16[{after}")
    )
    assert text != EXAMPLE
    with pytest.raises(ParseError) as caught:
        parse_graph(text)
    message = str(caught.value)
    assert expected in message
    lines = message.splitlines()
    caret = next(i for i, line in enumerate(lines) if line.strip() == "^")
    assert lines[caret - 1].strip() in "\n".join(text.splitlines()), "the offending line is shown above the caret"


def test_errors_name_the_file() -> None:
    with pytest.raises(ParseError) as caught:
        parse_graph("graph @g phase=joint {\n  %x = f(\n", "layer.ir")
    assert caught.value.where == "layer.ir:3:1"


@pytest.mark.parametrize(
    "nasty",
    [
        "(" * 100000,
        "[" * 100000,
        "-" * 100000,
        "Max(" * 5000,
        "9" * 100000,
        "2**(1000)*" * 300 + "1",
        "((s0**1000)**1000)**1000",
        "(2*s0)**1024",
        "((2*s0)**1000)**1000",
        "LShift(1, 10000000000)",
        "PowByNatural(10, 10000000000)",
        "1/0",
        "Max()",
        "Mod(1)",
        "Eq(1)",
        "Where(s0, 1, 2)",
        "Not(s0)",
        "nan + s0",
        "__import__",
        "symbol(__import__('os').system('true'))",
        "10**1000**1000",
        "2**0.5 + inf*s0",
    ],
)
def test_nasty_arguments_are_read_or_refused(nasty: str) -> None:
    """And neither takes hours or all memory, as building some of these numbers would."""
    try:
        graph = parse_graph(f"graph @g phase=joint {{\n  %x: f32[2] = f.g.h({nasty})\n  return ()\n}}\n")
    except ParseError:
        pass
    else:
        assert isinstance(graph, Graph)


def test_no_corruption_gets_past_the_parser_and_verifier() -> None:
    """Truncations, deletions, swaps and inserted tokens: a graph, or one of our errors."""
    generator = fresh_random()
    words = ["s0", "nan", "graph", "return", "loc(", "**", "symbol(", "complex(", "Max(", "1e999"]
    alphabet = [*'"\\()[]{}%@,=:*/-90$#\n\x00\u2028', *words]
    outcomes = {"same": 0, "read": 0, "refused": 0}
    for _ in range(1500):
        text = EXAMPLE
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(text) + 1)
            kind = generator.randrange(4)
            if kind == 0:
                text = text[:at]
            elif kind == 1:
                text = text[:at] + text[at + generator.randint(1, 9) :]
            elif kind == 2:
                text = text[:at] + generator.choice(alphabet) + text[at:]
            else:
                other = generator.randrange(len(text) + 1)
                text = text[:at] + text[other : other + 12] + text[at:]
        try:
            graph = parse_graph(text)
            verify(graph)
        except (ParseError, VerificationError) as error:
            assert isinstance(error, EffccError) and str(error)
            outcomes["refused"] += 1
        else:
            assert parse_graph(print_graph(graph)) == graph
            outcomes["same" if graph == parse_graph(EXAMPLE) else "read"] += 1
    assert outcomes["refused"] > 1000 and outcomes["read"] > 20, outcomes
