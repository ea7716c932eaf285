"""FX graphs of real models as IR: exact text round trip, source lines, forward names, alias and mutation facts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effcc.errors import CaptureError
from effcc.frontend.fx_import import from_fx
from effcc.frontend.fx_locations import clean_module_path, user_frame
from effcc.ir.expressions import symbol
from effcc.ir.graph import Alias, Graph, Symbol
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.ir.structural_hash import graph_hash
from effcc.ir.types import ScalarType, TensorType, TupleType
from effcc.ir.verifier import verify
from fx_captures import BY_DEFAULT, MODELS, Captured, graphs_of
from some_by_default import some_by_default
from torch.fx.experimental.proxy_tensor import make_fx


def imported(one: Captured) -> Graph:
    return from_fx(one.gm, one.model, one.phase, forward=one.forward)


def computing(graph: Graph) -> list:
    return [node for node in graph.nodes if node.op not in ("input", "getitem", "constant")]


@pytest.mark.parametrize("model", some_by_default(MODELS, BY_DEFAULT))
def test_every_graph_verifies_and_reads_back_equal(model: str) -> None:
    for one in graphs_of(model):
        graph = imported(one)
        verify(graph)
        text = print_graph(graph)
        again = parse_graph(text)
        assert again == graph
        assert print_graph(again) == text
        assert graph_hash(again) == graph_hash(graph)
        fx_names = [node.name for node in one.gm.graph.nodes if node.op not in ("output",)]
        assert sorted(node.name for node in graph.nodes) == sorted(fx_names)


@pytest.mark.parametrize("model", some_by_default(MODELS, BY_DEFAULT))
def test_forward_ops_carry_a_real_source_line(model: str) -> None:
    for one in graphs_of(model):
        nodes = computing(imported(one))
        if one.phase in ("forward", "inference"):
            located = [node for node in nodes if node.location.file]
            assert len(located) >= 0.95 * len(nodes)
            for node in located:
                path = Path(node.location.file)
                line = path.read_text(encoding="utf-8").splitlines()[node.location.line - 1]
                assert line.strip() == node.location.source
                assert "site-packages/torch/" not in node.location.file
        if one.phase == "backward" and len(nodes) > 20:
            assert sum(bool(node.location.file) for node in nodes) >= 0.95 * len(nodes)


def test_llama_ops_name_their_layer() -> None:
    graph = imported(next(one for one in graphs_of("llama") if one.phase == "forward"))
    matmuls = [node for node in graph.nodes if node.op == "aten.mm.default"]
    modules = [node.location.module.removeprefix("model.") for node in matmuls]
    assert modules == [
        f"layers.{layer}.{part}"
        for layer in range(3)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ] + ["lm_head"]  # fmt: skip


@pytest.mark.parametrize(
    "model", some_by_default(["llama", "gpt2", "mixtral", "t5", "vit", "conv"], {"mixtral", "conv"})
)
def test_backward_ops_name_their_forward_op(model: str) -> None:
    graphs = graphs_of(model)
    joint, forward, backward = (
        imported(next(one for one in graphs if one.phase == phase)) for phase in ("joint", "forward", "backward")
    )
    own = joint.by_name()
    named = [node for node in joint.nodes if node.forward]
    assert all(node.forward in own and not own[node.forward].forward for node in named)
    # Gradients of one op read what that op's neighbours made: the module paths agree.
    # Sums of gradients have no module.
    agreeing = [node for node in named if node.location.module in ("", own[node.forward].location.module)]
    assert len(agreeing) >= 0.95 * len(named)
    if model != "gpt2":
        back = computing(backward)
        assert sum(bool(node.forward) for node in back) >= 0.8 * len(back)
        assert {node.forward for node in back if node.forward} <= set(forward.by_name())


def test_a_matmuls_gradients_point_at_it() -> None:
    joint = imported(next(one for one in graphs_of("vit") if one.phase == "joint"))
    own = joint.by_name()
    gradients = [node for node in joint.nodes if node.forward and node.op == "aten.mm.default"]
    assert gradients
    for node in gradients:
        assert own[node.forward].op in ("aten.addmm.default", "aten.mm.default"), (node.name, node.forward)


def test_dynamic_sizes_stay_symbolic() -> None:
    graph = imported(next(one for one in graphs_of("llama_dynamic") if one.phase == "forward"))
    sizes = [node for node in graph.inputs if node.role == "symbol"]
    assert sizes and all(isinstance(node.type, ScalarType) for node in sizes)
    length = sizes[0].type.value
    assert length == symbol(length.name)
    assert any(node.type == TensorType("f32", (2 * length, 32)) for node in graph.nodes)
    assert any(node.op == "_operator.mul" and node.type == ScalarType("int", 2 * length) for node in graph.nodes)


def test_batch_norm_writes_its_statistics() -> None:
    one = next(one for one in graphs_of("conv") if one.phase == "forward")
    graph = imported(one)
    own = graph.by_name()
    writes = [alias for alias in graph.aliases if alias.writes]
    assert len(writes) == 9, "three layers of mean, variance and count"
    assert all(own[alias.base].op == "input" and own[alias.name].op == "aten.copy_.default" for alias in writes)


# Small graphs --------------------------------------------------------------------------------------------------------


def traced(function, *args, **options) -> Graph:
    gm = make_fx(function, tracing_mode="fake", **options)(*args)
    graph = from_fx(gm, "g", "inference")
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph
    return graph


def test_views_and_writes_by_schema() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first, second = x.view(4, 2).split(2)
        first.add_(1)
        torch.ops.aten.copy_.default(y, second)
        return x.clone()

    graph = traced(function, torch.zeros(8), torch.zeros(2, 2))
    facts = set(graph.aliases)
    assert {
        Alias("view", "x_1"),
        Alias("split", "view"),
        Alias("getitem", "split"),
        Alias("getitem_1", "split"),
        Alias("add_", "getitem", writes=True),
        Alias("copy_", "y_1", writes=True),
    } == facts


def test_a_multi_output_ops_parts_alias_only_what_its_schema_says() -> None:
    def function(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._native_batch_norm_legit.default(x, None, None, mean, var, True, 0.1, 1e-5)[0]

    graph = traced(function, torch.zeros(2, 3, 4), torch.zeros(3), torch.ones(3))
    assert {(alias.base, alias.writes) for alias in graph.aliases} == {("mean_1", True), ("var_1", True)}


def test_constant_arguments() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros((2, 2), dtype=torch.bfloat16, device="cpu").to(memory_format=torch.contiguous_format)
        return torch.ops.aten.clamp.default(x, -float("inf"), None) + y.sum() + torch.tensor(3.0)

    graph = traced(function, torch.zeros(4))
    own = {node.op: node for node in graph.nodes}
    assert dict(own["aten.zeros.default"].kwargs)["dtype"] == Symbol("torch.bfloat16")
    assert dict(own["aten.zeros.default"].kwargs)["device"] == Symbol("device(cpu)")
    assert own["aten.clamp.default"].args[1:] == (-float("inf"),)
    assert own["constant"].args == ("_tensor_constant0",)


def test_higher_order_ops_keep_their_subgraphs() -> None:
    from torch._higher_order_ops import cond

    def function(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return cond(p, lambda x: x.sin(), lambda x: x.cos(), (x,))[0] if False else cond(p, torch.sin, torch.cos, (x,))

    graphs: list[Graph] = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(from_fx(gm, "g", "inference"))
        return gm

    torch.compile(function, backend=backend)(torch.tensor(True), torch.ones(3))
    verify(graphs[0])
    assert parse_graph(print_graph(graphs[0])) == graphs[0]
    node = next(node for node in graphs[0].nodes if node.op == "higher_order.cond")
    assert [argument.text for argument in node.args[1:3]] == [f"@{name}" for name in graphs[0].subgraphs]
    bodies = list(graphs[0].subgraphs.values())
    assert [body.nodes[-1].op.rsplit(".", 1)[-1] for body in bodies] == ["sin", "cos"]


def test_nested_compile_regions_become_calls() -> None:
    @torch.compiler.nested_compile_region
    def layer(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    graphs: list[Graph] = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(from_fx(gm, "g", "inference"))
        return gm

    torch.compile(lambda x: layer(layer(x)), backend=backend)(torch.ones(3))
    verify(graphs[0])
    calls = [node for node in graphs[0].nodes if node.op == "call"]
    assert len(calls) == 2 and calls[0].args[0] == calls[1].args[0] == Symbol(f"@{next(iter(graphs[0].subgraphs))}")
    assert calls[0].type == TupleType((TensorType("f32", (3,)),))


def test_wrong_number_of_roles_is_refused() -> None:
    gm = make_fx(lambda x: x + 1)(torch.ones(2))
    with pytest.raises(CaptureError, match="2 roles for the 1 inputs"):
        from_fx(gm, "g", "inference", roles=["input", "input"])


# Locations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("L['self'].model.layers.2.self_attn", "model.layers.2.self_attn"),
        ("L['self']._modules['layers']._modules['3'].mlp", "layers.3.mlp"),
        ("L['self'].layers[3].mlp", "layers.3.mlp"),
        ("L['self']", ""),
        ("self.layers.0", "layers.0"),
        ("model.layers.0", "model.layers.0"),
        ("L['self']._orig_mod.layers.0", "layers.0"),
    ],
)
def test_module_paths(path: str, clean: str) -> None:
    assert clean_module_path(path) == clean


def test_the_last_frame_outside_of_torch_counts() -> None:
    inside = Path(torch.__file__).parent / "nn" / "modules" / "linear.py"
    trace = (
        'File "/home/me/model.py", line 3, in forward\n    y = self.block(x)\n          ^^^^\n'
        '  File "/home/me/block.py", line 88, in forward\n    h = self.up(x)\n'
        f'  File "{inside}", line 134, in forward\n    return F.linear(input)\n'
    )
    assert user_frame(trace) == ("/home/me/block.py", 88, "h = self.up(x)")
    assert user_frame(trace.splitlines()[-2].strip() + "\n    return F.linear(input)\n")[1] == 134
    assert user_frame("nothing to see") == ("", 0, "")
