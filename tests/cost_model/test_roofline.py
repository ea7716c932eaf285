"""Costs of ops, kernels and regions against torch's own counter and against counts made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
import torch
from captured_models import example
from effcc.cost_model.devices import Device, load_device
from effcc.cost_model.fusion import group_kernels
from effcc.cost_model.roofline import gemm_seconds, graph_cost, op_cost, region_cost
from effcc.cost_model.tensors import TensorTable
from effcc.errors import ShapeError
from effcc.ir.graph import Graph, Node, Ref, Symbol
from effcc.ir.types import TensorType, TupleType, Type
from some_by_default import some_by_default
from torch.utils import flop_counter


def graph_of(op: str, inputs: dict[str, Type], args: tuple[Any, ...], out: Type, **kwargs: Any) -> Graph:
    """One op over inputs; strings in ``args`` that name inputs are references."""
    operands = tuple(Ref(a) if isinstance(a, str) and a in inputs else a for a in args)
    nodes = [Node(name, "input", type=kind, role="input") for name, kind in inputs.items()]
    nodes.append(Node("out", op, operands, tuple(kwargs.items()), out))
    return Graph("g", "inference", tuple(nodes), (Ref("out"),))


def f32(*shape: Any) -> TensorType:
    return TensorType("f32", shape)


def cost_of(graph: Graph, device: str = "h100", **bindings: int) -> Any:
    return op_cost(graph.by_name()["out"], graph, load_device(device), bindings)


# torch's counter does not know the CPU's flash attention; its formula is the counter's own for flash attention.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *rest, out_shape=None, **options: flop_counter.sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *rest, out_shape=None, **options: flop_counter.sdpa_backward_flop_count(g, q, k, v)
    ),
}


@pytest.mark.parametrize(
    "name", some_by_default(["llama", "llama_eager", "gpt2", "residual_net"], {"llama", "residual_net"})
)
def test_contractions_of_real_training_steps_count_as_torch_counts(name: str) -> None:
    captured = example(name)
    with flop_counter.FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        captured.call()
    counted = sum(graph_cost(graph, load_device("h100")).matmul_flop for graph in captured.graphs)
    assert counted == counter.get_total_flops() > 0


def torch_flops(run: Any) -> int:
    with flop_counter.FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", [(True, True, False), (False, True, True), (True, False, False)])
def test_convolution_backward(transposed: bool, groups: int, mask: tuple[bool, bool, bool]) -> None:
    x = torch.randn(2, 4, 9, 7)
    weight = torch.randn(4, 6 // groups, 3, 3) if transposed else torch.randn(6, 4 // groups, 3, 3)
    settings = ([2, 2], [1, 1], [1, 1], transposed, [0, 0], groups)
    out = torch.ops.aten.convolution(x, weight, None, *settings)
    gradient = torch.randn_like(out)
    expected = torch_flops(lambda: torch.ops.aten.convolution_backward(gradient, x, weight, [6], *settings, list(mask)))
    graph = graph_of(
        "aten.convolution_backward.default",
        {"g": f32(*gradient.shape), "x": f32(*x.shape), "w": f32(*weight.shape)},
        ("g", "x", "w", (6,), (2, 2), (1, 1), (1, 1), transposed, (0, 0), groups, mask),
        TupleType((f32(*x.shape), f32(*weight.shape), f32(6))),
    )
    assert cost_of(graph).matmul_flop == expected


def test_batched_products_with_broadcast() -> None:
    graph = graph_of("aten.matmul.default", {"a": f32(5, 1, 3, 4), "b": f32(7, 4, 6)}, ("a", "b"), f32(5, 7, 3, 6))
    assert cost_of(graph).matmul_flop == 2 * 35 * 3 * 4 * 6
    graph = graph_of("aten.mv.default", {"a": f32(3, 4), "b": f32(4)}, ("a", "b"), f32(3))
    assert cost_of(graph).matmul_flop == 24
    graph = graph_of("aten.linear.default", {"x": f32(2, 3, 4), "w": f32(5, 4)}, ("x", "w"), f32(2, 3, 5))
    assert cost_of(graph).matmul_flop == 2 * 6 * 4 * 5


def test_grouped_query_attention_counts_every_query_head() -> None:
    q, kv = f32(2, 8, 16, 32), f32(2, 2, 24, 32)
    out = TupleType((q, f32(2, 8, 16)))
    graph = graph_of(
        "aten._scaled_dot_product_flash_attention.default", {"q": q, "k": kv, "v": kv}, ("q", "k", "v"), out
    )
    assert cost_of(graph).matmul_flop == 2 * 2 * 8 * 16 * 24 * (32 + 32)


def test_causal_attention_counts_whole_but_takes_half_the_time() -> None:
    q = TensorType("bf16", (1, 16, 4096, 128))
    out = TupleType((q, f32(1, 16, 4096)))
    name = "aten._scaled_dot_product_flash_attention.default"
    full = cost_of(graph_of(name, {"q": q}, ("q", "q", "q", 0.0, False), out))
    causal = cost_of(graph_of(name, {"q": q}, ("q", "q", "q", 0.0, True), out))
    assert full.matmul_flop == causal.matmul_flop
    launch = load_device("h100").launch.value
    other = 4 * 16 * 4096 * 4096 / load_device("h100").vector_rate("bf16")
    fraction = (causal.seconds - launch - other) / (full.seconds - launch - other)
    assert fraction == pytest.approx((4096 + 1) / (2 * 4096), rel=1e-6)


def test_a_mask_does_not_decide_the_rate_of_a_product() -> None:
    """Scores of one head of 64: the mask has more elements than queries, keys and values together."""
    inputs: dict[str, Type] = {name: TensorType("bf16", (1, 1, 2048, 64)) for name in "qkv"}
    heads = TensorType("bf16", (1, 1, 2048, 64))
    plain = graph_of("aten.scaled_dot_product_attention", inputs, (Ref("q"), Ref("k"), Ref("v")), heads)
    masked = graph_of(
        "aten.scaled_dot_product_attention",
        inputs | {"mask": TensorType("b1", (1, 1, 2048, 2048))},
        (Ref("q"), Ref("k"), Ref("v"), Ref("mask")),
        heads,
    )
    slow = cost_of(masked, "l4").seconds
    read = 2048 * 2048 / load_device("l4").bandwidth
    assert slow <= cost_of(plain, "l4").seconds + 2 * read


def test_large_product_is_compute_bound_and_a_copy_is_memory_bound() -> None:
    h100 = load_device("h100")
    big = TensorType("bf16", (8192, 8192))
    product = cost_of(graph_of("aten.mm.default", {"a": big, "b": big}, ("a", "b"), big))
    assert product.bound == "compute" and product.flop == 2 * 8192**3 and product.bytes == 3 * big.bytes
    assert product.seconds >= product.flop / h100.matrix_rate("bf16")
    add = cost_of(graph_of("aten.add.Tensor", {"a": big, "b": big}, ("a", "b"), big))
    assert add.bound == "memory" and add.bytes == 3 * big.bytes and add.flop == 8192**2
    assert add.seconds >= add.bytes / h100.bandwidth
    tiny = cost_of(graph_of("aten.add.Tensor", {"a": f32(4)}, ("a", 1), f32(4)))
    assert tiny.bound == "launch" and tiny.seconds >= h100.launch.value


def test_views_are_free_and_expanded_reads_are_not_counted_twice() -> None:
    view = cost_of(graph_of("aten.permute.default", {"a": f32(8, 4)}, ("a", (1, 0)), f32(4, 8)))
    assert (view.flop, view.bytes, view.seconds, view.bound) == (0, 0, 0.0, "none")
    row = TensorType("f32", (1024, 1024), stride=(0, 1))
    add = cost_of(graph_of("aten.add.Tensor", {"a": row, "b": f32(1024, 1024)}, ("a", "b"), f32(1024, 1024)))
    assert add.bytes == 4 * (1024 + 2 * 1024 * 1024)


def test_embedding_reads_only_the_rows_it_picks() -> None:
    rows, indices = f32(128_000, 4096), TensorType("i64", (2, 8))
    out = f32(2, 8, 4096)
    embedding = graph_of("aten.embedding.default", {"w": rows, "i": indices}, ("w", "i"), out)
    assert cost_of(embedding).bytes == 2 * out.bytes + indices.bytes
    assert region_cost(embedding.nodes, embedding, load_device("h100")).bytes == 2 * out.bytes + indices.bytes


def test_an_op_that_nobody_knows_reads_and_writes_once() -> None:
    cost = cost_of(graph_of("aten.some_future_op.default", {"a": f32(10, 10)}, ("a",), f32(10, 10)))
    assert (cost.flop, cost.bytes) == (100, 800)


def test_symbolic_sizes() -> None:
    s0 = sympy.Symbol("s0", integer=True, positive=True)
    graph = graph_of("aten.mm.default", {"a": f32(s0, 8), "b": f32(8, 4)}, ("a", "b"), f32(s0, 4))
    assert cost_of(graph, s0=16).matmul_flop == 2 * 16 * 8 * 4
    with pytest.raises(ShapeError, match="no value for s0"):
        cost_of(graph)


def test_a_call_costs_what_its_body_costs() -> None:
    body = graph_of("aten.mm.default", {"a": f32(64, 64), "b": f32(64, 64)}, ("a", "b"), f32(64, 64))
    nodes = (
        Node("x", "input", type=f32(64, 64), role="input"),
        Node("y", "call", (Symbol("@layer"), Ref("x"), Ref("x")), type=TupleType((f32(64, 64),))),
        Node("z", "call", (Symbol("@layer"), Ref("x"), Ref("x")), type=TupleType((f32(64, 64),))),
    )
    graph = Graph("g", "inference", nodes, (Ref("y"), Ref("z")), subgraphs={"layer": body})
    device = load_device("l4")
    once = graph_cost(body, device)
    twice = graph_cost(graph, device)
    assert twice.flop == 2 * once.flop and twice.seconds == pytest.approx(2 * once.seconds)


def chain(*ops: tuple[str, str, tuple[str, ...], TensorType]) -> Graph:
    """``x`` [64, 128] and then ops (name, op, operands, type); the last is returned."""
    nodes = [Node("x", "input", type=f32(64, 128), role="input")]
    nodes += [Node(name, op, tuple(Ref(o) for o in operands), type=type_) for name, op, operands, type_ in ops]
    return Graph("g", "inference", tuple(nodes), (Ref(nodes[-1].name),))


def kernels_of(graph: Graph) -> list[list[str]]:
    return [[node.name for node in kernel.nodes] for kernel in group_kernels(graph.nodes, graph)]


def test_softmax_written_out_is_one_kernel_that_reads_and_writes_once() -> None:
    full, row = f32(64, 128), f32(64, 1)
    graph = chain(
        ("m", "aten.amax.default", ("x",), row),
        ("d", "aten.sub.Tensor", ("x", "m"), full),
        ("e", "aten.exp.default", ("d",), full),
        ("s", "aten.sum.dim_IntList", ("e",), row),
        ("y", "aten.div.Tensor", ("e", "s"), full),
    )
    assert kernels_of(graph) == [["m", "d", "e", "s", "y"]]
    cost = region_cost(graph.nodes, graph, load_device("h100"))
    assert cost.bytes == 2 * 64 * 128 * 4
    assert cost.flop == graph_cost(graph, load_device("h100")).flop == 5 * 64 * 128


def test_pointwise_around_a_product_is_two_kernels_and_a_diamond_is_no_circle() -> None:
    full = f32(64, 128)
    square = f32(64, 64)
    graph = chain(
        ("a", "aten.exp.default", ("x",), full),
        ("b", "aten.relu.default", ("a",), full),
        ("p", "aten.mm.default", ("a", "x"), square),
        ("q", "aten.mm.default", ("p", "b"), full),
        ("y", "aten.add.Tensor", ("b", "q"), full),
    )
    assert kernels_of(graph) == [["a", "b"], ["p"], ["q"], ["y"]]


def test_a_reduction_to_other_sizes_starts_a_kernel() -> None:
    full = f32(64, 128)
    graph = chain(
        ("s", "aten.sum.dim_IntList", ("x",), f32(64)),
        ("t", "aten.sum.dim_IntList", ("s",), f32()),
        ("y", "aten.mul.Tensor", ("x", "t"), full),
    )
    assert kernels_of(graph) == [["s", "t"], ["y"]]


@pytest.mark.parametrize(
    "name", some_by_default(["llama", "llama_eager", "gpt2", "residual_net"], {"llama", "residual_net"})
)
def test_fused_kernels_of_real_graphs_keep_order_and_move_less(name: str) -> None:
    device = load_device("h100")
    for graph in example(name).graphs:
        table = TensorTable(graph)
        kernels = group_kernels(graph.nodes, graph, table)
        work = [node.name for kernel in kernels for node in kernel.nodes]
        assert len(work) == len(set(work))
        ready = {node.name for node in graph.nodes if node.name not in set(work)}
        for kernel in kernels:
            inside = {node.name for node in kernel.nodes}
            for node in kernel.nodes:
                assert all(o in ready or o in inside or _is_view(o, graph, ready | inside) for o in node.operands())
            ready |= inside
        fused, eager = region_cost(graph.nodes, graph, device), graph_cost(graph, device)
        assert fused.flop == eager.flop and fused.matmul_flop == eager.matmul_flop
        assert fused.bytes < eager.bytes and fused.seconds < eager.seconds


def _is_view(name: str, graph: Graph, ready: set[str]) -> bool:
    return all(operand in ready for operand in graph.by_name()[name].operands())


def test_tiles_that_do_not_fill_the_units_cost_a_whole_wave() -> None:
    h100 = load_device("h100")
    full = gemm_seconds(1, 128 * 132, 4096, 128, "bf16", h100)
    one_more = gemm_seconds(1, 128 * 133, 4096, 128, "bf16", h100)
    assert one_more / full == pytest.approx(2.0, rel=1e-6)


def test_longer_work_takes_longer() -> None:
    device: Device = load_device("a100-80g")
    sizes = [2**i for i in range(6, 14)]
    times = [gemm_seconds(1, n, n, n, "bf16", device) for n in sizes]
    assert times == sorted(times) and all(math.isfinite(t) for t in times)
    copies = [cost_of(graph_of("aten.neg.default", {"a": f32(n, n)}, ("a",), f32(n, n)), "cpu") for n in sizes]
    assert [c.seconds for c in copies] == sorted(c.seconds for c in copies)


def test_a_librarys_grouped_products_are_counted_by_their_rows() -> None:
    """Experts of 6, 0, 3 and 7 rows: a loop of plain products, counted by torch, is what the op is counted as."""
    ends = [6, 6, 9, 16]
    rows, weights = torch.randn(16, 8), torch.randn(4, 8, 12)

    def loop() -> None:
        begin = 0
        for group, end in enumerate(ends):
            if end > begin:
                torch.mm(rows[begin:end], weights[group])
            begin = end

    inputs: dict[str, Type] = {"x": f32(16, 8), "w": f32(4, 8, 12), "ends": TensorType("i32", (4,)), "g": f32(16, 12)}
    forward = graph_of("transformers.grouped_mm_fallback.default", inputs, ("x", "w", "ends"), f32(16, 12))
    assert cost_of(forward).matmul_flop == torch_flops(loop)
    both = TupleType((f32(16, 8), f32(4, 8, 12)))
    backward = graph_of("transformers.grouped_mm_fallback_backward.default", inputs, ("x", "w", "ends", "g"), both)
    assert cost_of(backward).matmul_flop == 2 * torch_flops(loop)
    plain = graph_of("aten._grouped_mm.default", inputs, ("x", "w", "ends"), f32(16, 12))
    assert cost_of(plain).matmul_flop == torch_flops(loop)
