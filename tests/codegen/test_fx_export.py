"""IR back to FX: the exported module computes bit for bit what the captured one did, on the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effcc.codegen.fx_export import to_fx
from effcc.codegen.fx_targets import op_target
from effcc.errors import ExportError
from effcc.frontend.fx_import import from_fx, tensor_constants
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.ir.structural_hash import first_difference, graph_hash, op_hashes
from effcc.passes.repeated_structure import RepeatedStructure
from fx_captures import BY_DEFAULT, MODELS, Captured, copy_value, graphs_of
from some_by_default import some_by_default


def run(gm: torch.fx.GraphModule, args: list[Any]) -> list[Any]:
    """Outputs, then the inputs as the graph left them."""
    args = [copy_value(value) for value in args]
    torch.manual_seed(1)
    with torch.no_grad():
        result = torch.fx.Interpreter(gm).run(*args, enable_io_processing=False)
    return [*torch.utils._pytree.tree_leaves(result), *args]


def assert_bitwise_equal(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(a.nan_to_num(), b.nan_to_num())
        else:
            assert type(a) is type(b) and a == b


def imported(one: Captured) -> Graph:
    return from_fx(one.gm, one.model, one.phase, forward=one.forward)


@pytest.mark.parametrize("model", some_by_default(MODELS, BY_DEFAULT - {"llama_dynamic", "llama_inference"}))
def test_runs_bit_for_bit_as_captured(model: str) -> None:
    for one in graphs_of(model):
        assert one.args, f"{one} was called"
        graph, constants = imported(one), tensor_constants(one.gm)
        expected = run(one.gm, one.args)
        read = parse_graph(print_graph(graph))
        exported = to_fx(read, constants=constants)
        assert_bitwise_equal(run(exported, one.args), expected)
        outlined = RepeatedStructure().apply(graph)
        for calls in ("invoke_subgraph", "module") if outlined.subgraphs else ():
            assert_bitwise_equal(run(to_fx(outlined, constants=constants, calls=calls), one.args), expected)


@pytest.mark.parametrize("model", some_by_default(["llama", "llama_dynamic", "t5", "conv"], {"conv"}))
def test_exported_graphs_import_as_they_were(model: str) -> None:
    """Types, strides and symbolic sizes survive: the fake tensors are those of the capture."""
    for one in graphs_of(model):
        graph = imported(one)
        again = from_fx(to_fx(graph, constants=tensor_constants(one.gm)), one.model, one.phase)
        difference = first_difference(op_hashes(graph), again)
        assert difference is None, difference
        assert graph_hash(again) == graph_hash(graph)
        assert [node.name for node in again.nodes] == [node.name for node in graph.nodes]
        if model != "llama_dynamic":
            assert [node.type for node in again.nodes] == [node.type for node in graph.nodes]
        assert [node.location for node in again.nodes] == [node.location for node in graph.nodes]


DYNAMIC = """\
graph @g phase=inference {
  %x: f32[s0,4] = input()  role(input)
  %y: f32[2*s0,4] = aten.cat.default([%x, %x])
  %z: f32[s0,8] = aten.view.default(%y, [s0, 8])
  %w: f32[FloorDiv(s0, 2),8] = aten.slice.Tensor(%z, 0, 0, FloorDiv(s0, 2))
  return (%w, 2*s0 + 1)
}
"""


@pytest.mark.parametrize("size", [2, 5, 9])
def test_size_expressions_are_computed_from_the_inputs(size: int) -> None:
    x = torch.randn(size, 4)
    sliced, number = to_fx(parse_graph(DYNAMIC))(x)
    assert number == 2 * size + 1
    assert torch.equal(sliced, torch.cat([x, x]).view(size, 8)[: size // 2])


def test_symbolic_sizes_take_the_hints() -> None:
    gm = to_fx(parse_graph(DYNAMIC), hints={"s0": 12})
    value = next(node for node in gm.graph.nodes if node.name == "w").meta["val"]
    assert value.shape[0].node.hint == 6 and not isinstance(value.shape[0], int)


def test_fake_tensors_of_an_absent_device() -> None:
    text = "graph @g phase=inference {\n  %x: bf16[2,3]{1,2}@cuda:0 = input()\n  return (%x)\n}\n"
    value = next(iter(to_fx(parse_graph(text)).graph.nodes)).meta["val"]
    assert (str(value.device), value.stride(), value.dtype) == ("cuda:0", (1, 2), torch.bfloat16)


@pytest.mark.parametrize(
    "op",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "builtins.__import__",
        "torch.load",
        "torch.hub.load",
        "torch.ops.load_library",
        "load_library.x.y",
        "_operator.methodcaller",
        "_operator.attrgetter",
        "_operator.call",
        "math.__loader__",
        "aten.__class__.default",
        "aten.mm.default.__globals__",
        "nosuch.op.default",
        "aten",
    ],
)
def test_names_reach_ops_only(op: str) -> None:
    with pytest.raises(ExportError, match="not known to torch"):
        op_target(op)


def test_errors_name_what_is_missing() -> None:
    text = 'graph @g phase=inference {{\n  %x: f32[2] = {}  loc(model.py:3 "x")\n  return (%x)\n}}\n'
    with pytest.raises(ExportError, match=r"constant 'weights' \(%x\) is not given") as caught:
        to_fx(parse_graph(text.format('constant("weights")')))
    assert caught.value.where == "model.py:3"
    with pytest.raises(ExportError, match="no input of graph @g has the size s7"):
        to_fx(parse_graph(text.format("aten.zeros.default([s7])")))
    with pytest.raises(ExportError, match="has no value here"):
        to_fx(parse_graph(text.format('aten.rand.generator([2], generator=symbol("generator(cpu)"))')))
