"""The replacement pass: groups as nodes, text that reads back, and graphs that still compute what they did."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from attention_variants import VARIANTS, with_gradients
from effcc.errors import ParseError, VerificationError
from effcc.ir.cascade_interpreter import evaluate
from effcc.ir.fused_cascade import FusedCascade
from effcc.ir.graph import CASCADE_OP, Alias, Graph, Node, Ref, Symbol
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.ir.structural_hash import graph_hash
from effcc.ir.types import DTYPES, TensorType
from effcc.ir.verifier import verify
from effcc.passes.fuse_cascades import FuseCascades
from effcc.passes.raising.analysis import raise_and_analyse
from fresh_seed import fresh_random
from raised_graphs import EVERYTHING, Run, assert_close, record, take_view

_FUSE = FuseCascades(saved_bytes=0, gain=0.0)


def _run(graph: Graph, values: Mapping[str, Any]) -> list[Any]:
    """The graph's outputs, its ATen ops run by torch in float64, its cascades as written by numpy."""
    found: dict[str, Any] = {}

    def argument(item: Any) -> Any:
        if isinstance(item, Ref):
            return found[item.name]
        if isinstance(item, tuple):
            return [argument(each) for each in item]
        if isinstance(item, Symbol):
            if item.text.startswith("device"):
                return torch.device("cpu")
            return getattr(torch, item.text.removeprefix("torch."))
        return item

    for node in graph.nodes:
        if node.op == "input":
            found[node.name] = values[node.name]
        elif node.op == "getitem":
            found[node.name] = found[node.args[0].name][node.args[1]]  # type: ignore[union-attr,index]
        elif node.op == CASCADE_OP:
            fused = graph.cascades[node.args[0].text[1:]]  # type: ignore[union-attr]
            found[node.name] = _run_cascade(fused, [argument(item) for item in node.args[1:]])
        else:
            namespace, name, overload = node.op.split(".")
            op = getattr(getattr(getattr(torch.ops, namespace), name), overload)
            found[node.name] = op(*map(argument, node.args), **{key: argument(value) for key, value in node.kwargs})
    return [argument(output) for output in graph.outputs]


def _run_cascade(fused: FusedCascade, operands: list[Any]) -> list[Any]:
    inputs = {view.tensor: take_view(operands[view.position].double().numpy(), view) for view in fused.inputs}
    computed = evaluate(fused.cascade, inputs, {name: int(size) for name, size in fused.sizes.items()})
    results: list[Any] = [None] * len(fused.results)
    for view in fused.outputs:
        kind = fused.results[view.position]
        array = np.zeros([int(size) for size in kind.shape])
        grids = np.meshgrid(*(np.arange(int(size)) for size in view.sizes), indexing="ij") if view.sizes else []
        places = tuple(
            np.broadcast_to(np.asarray(_numpy(view.ranks, at)(*grids)), computed[view.tensor].shape)
            for at in view.index
        )
        array[places] = computed[view.tensor]
        results[view.position] = torch.from_numpy(array).to(getattr(torch, DTYPES[kind.dtype][0]))
    return results


def _numpy(ranks: Any, at: Any) -> Callable[..., Any]:
    import sympy

    return sympy.lambdify(ranks, at, "numpy")  # type: ignore[no-any-return]


@functools.cache
def _joint(name: str) -> tuple[Run, tuple[Any, ...]]:
    variant = VARIANTS[name]
    inputs = variant.inputs(fresh_random().getrandbits(32), torch.float64)
    runs = record(variant.function, with_gradients(variant, inputs))
    return next(run for run in runs if run.phase == "joint"), inputs


_SOME = ["causal", "temperature", "sink_joined", "joint_projection", "linear_cross_entropy_weighted", "builtin_mask"]


@pytest.mark.parametrize("name", _SOME)
def test_the_graph_computes_what_it_did(name: str) -> None:
    run, _ = _joint(name)
    fused = _FUSE.apply(run.graph)
    verify(fused)
    values = {node.name: torch.from_numpy(np.asarray(run.values[node.name])) for node in run.graph.inputs}
    for node in run.graph.inputs:
        if isinstance(node.type, TensorType):
            values[node.name] = values[node.name].to(getattr(torch, DTYPES[node.type.dtype][0]))
    for found, output in zip(_run(fused, values), run.graph.outputs, strict=True):
        if isinstance(output, Ref):
            assert_close(found.double().numpy(), run.values[output.name], output.name, 1e-9)


@pytest.mark.parametrize("name", _SOME)
def test_text_reads_back(name: str) -> None:
    graph = _FUSE.apply(_joint(name)[0].graph)
    assert len(graph.cascades) >= 2
    again = parse_graph(print_graph(graph))
    assert again == graph
    assert graph_hash(again) == graph_hash(graph)
    assert print_graph(again) == print_graph(graph)


def test_values_keep_names_types_and_places() -> None:
    run, _ = _joint("causal")
    fused = _FUSE.apply(run.graph)
    before, after = run.graph.by_name(), fused.by_name()
    assert fused.outputs == run.graph.outputs
    for name, node in after.items():
        if name in before:
            assert node.type == before[name].type
            assert node.location == before[name].location
    calls = [node for node in fused.nodes if node.op == CASCADE_OP]
    assert len(calls) == 2
    assert all("fused from" in call.origin for call in calls)
    # Nothing of queries times keys is left.
    assert not any(isinstance(n.type, TensorType) and n.type.shape[-2:] == (12, 12) for n in fused.nodes)


def test_nothing_to_fuse_is_the_same_graph() -> None:
    with torch.no_grad():
        (run,) = record(lambda x: (x * 2).softmax(-1), [torch.randn(3, 4)])
    assert _FUSE.apply(run.graph) is run.graph


def test_equal_cascades_share_one_entry() -> None:
    def twice(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        first = (q @ k.transpose(-1, -2)).softmax(-1) @ k
        return (first @ k.transpose(-1, -2)).softmax(-1) @ k

    with torch.no_grad():
        (run,) = record(twice, [torch.randn(2, 9, 4), torch.randn(2, 7, 4)])
    fused = _FUSE.apply(run.graph)
    assert sum(node.op == CASCADE_OP for node in fused.nodes) == 2
    assert len(fused.cascades) == 1


def test_dropout_on_the_weights_is_left_alone() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5, True) @ k

    with torch.no_grad():
        (run,) = record(attention, [torch.randn(2, 9, 4), torch.randn(2, 7, 4)])
    (analysis, *_) = raise_and_analyse(run.graph, EVERYTHING)
    fused = _FUSE.apply(run.graph)
    verify(fused)
    random = [
        node.name for node in run.graph.nodes if "rand" in node.op or "dropout" in node.op or "bernoulli" in node.op
    ]
    assert random
    assert [node.name for node in fused.nodes if node.name in random] == random
    assert set(random) & set(analysis.kept) or not analysis.groups


def test_a_write_keeps_its_place() -> None:
    """The buffer is read by the group before it is written: the node must not move behind the write."""
    with torch.no_grad():
        (run,) = record(VARIANTS["vanilla"].function, VARIANTS["vanilla"].inputs(0))
    graph = run.graph
    query = graph.inputs[0]
    write = Node("written", "aten.copy_.default", (Ref(query.name), Ref("new")), type=query.type)
    new = Node("new", "input", type=query.type, role="input")
    inputs, body = [n for n in graph.nodes if n.op == "input"], [n for n in graph.nodes if n.op != "input"]
    aliases = (*graph.aliases, Alias("written", query.name, True))
    for nodes, first in (((*inputs, new, *body, write), "cascade"), ((*inputs, new, write, *body), "written")):
        changed = Graph(graph.name, graph.phase, nodes, graph.outputs, aliases=aliases)
        fused = _FUSE.apply(changed)
        verify(fused)
        order = [node.op.split(".")[1] if node.op == CASCADE_OP else node.name for node in fused.nodes]
        if "cascade" in order:
            assert order.index(first) < order.index("written" if first == "cascade" else "cascade")


_TEXT = """
graph @g phase=inference {
  cascade @c (f32[3,4], f32[4]) -> (f32[3],) {
    size m = 3
    size n = 4
    input 0 [3, 4] "A[m,n] = X[m,n]"
    input 1 [4] "B[n] = X[n]"
    output 0 [3] "Y[m] = X[m]"
    type Y f32
    "Y[m] = sum[n] A[m,n]*B[n]"
  }
  %a: f32[3,4] = input()
  %b: f32[4] = input()
  %call: (f32[3],) = effcc.cascade.default(@c, %a, %b)
  %y: f32[3] = getitem(%call, 0)
  return (%y)
}
"""


def test_a_graph_with_a_cascade_as_text() -> None:
    graph = parse_graph(_TEXT)
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    (y,) = _run(graph, {"a": a, "b": b})
    torch.testing.assert_close(y, (a @ b).float())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"Y[m] = sum[n] A[m,n]*B[n]"', '"Y[m] = sum[n] A[m,n]*"', "not a cascade"),
        ('"A[m,n] = X[m,n]"', '"A[m,n] = X[m]"', "2 dimensions"),
        ('"A[m,n] = X[m,n]"', '"A[m,n] = exp(X[m,n])"', "a view is one tensor"),
        ("input 1 [4]", "input 2 [4]", "only 2"),
        ("input 1 [4]", "input 1 [4, 4]", "one size for each"),
        ("size n = 4", "sizes n = 4", "expected 'size'"),
        ("-> (f32[3],) {", "-> (int,) {", "tensors"),
    ],
)
def test_broken_text_is_told(old: str, new: str, told: str) -> None:
    with pytest.raises(ParseError, match=told):
        parse_graph(_TEXT.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("(@c, %a, %b)", "(@d, %a, %b)", "@d"),
        ("(@c, %a, %b)", "(@c, %b, %a)", "other operands"),
        ("%call: (f32[3],)", "%call: (f32[3], f32[3])", "another type"),
    ],
)
def test_a_node_that_does_not_fit_its_cascade(old: str, new: str, told: str) -> None:
    with pytest.raises(VerificationError, match=told):
        verify(parse_graph(_TEXT.replace(old, new)))
