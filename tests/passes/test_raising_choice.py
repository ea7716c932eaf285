"""What is worth fusing: wide tensors that memory is spared of, not products that take the time, nor library ops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from effcc.cost_model.devices import list_devices, load_device
from effcc.ir.graph import Graph
from effcc.passes.raising.candidates import Candidates
from effcc.passes.raising.choose import Choice, Rates, candidates_of, choose, choose_among
from effcc.passes.raising.components import components
from effcc.passes.raising.group import Traffic
from effcc.passes.raising.own_copies import with_own_copies
from effcc.passes.raising.prefilter import may_fuse
from effcc.passes.raising.raise_graph import raise_graph
from effcc.passes.raising.traffic import INDEXED, SEARCHED, TablePrices
from raised_graphs import record

CPU = Choice(Rates.of(load_device("cpu")))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v


def library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def graph_of(function: object, rows: int, width: int) -> Graph:
    values = [torch.randn(1, 1, rows, width) for _ in range(3)]
    (run,) = record(function, values)  # type: ignore[arg-type]
    return run.graph


def test_attention_over_many_keys_is_taken() -> None:
    graph = graph_of(attention, 2200, 64)
    assert may_fuse(graph, CPU)
    (group,) = choose(raise_graph(graph), CPU).groups
    assert group.traffic.fused < group.traffic.written / 5


def test_a_second_choice_among_the_same_candidates_is_the_one_made_anew() -> None:
    raised = raise_graph(graph_of(attention, 2200, 64))
    strict = replace(CPU, gain=1e9, memory_ratio=1e9)
    candidates = candidates_of(raised, CPU)
    for choice in (CPU, strict, CPU):
        chosen, anew = choose_among(candidates, choice), choose(raised, choice)
        assert [each.nodes for each in chosen.groups] == [each.nodes for each in anew.groups]
        assert chosen.refused == anew.refused and chosen.decisions == anew.decisions
        assert bool(chosen.groups) == (choice is CPU)


def test_one_query_over_keys_that_heads_share_is_taken() -> None:
    """A decoding step: nothing is wide but the keys and values, which eager copies for each head of queries."""

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1))

    caches = [torch.randn(1, 2, 3000, 64) for _ in range(2)]
    (run,) = record(step, (torch.randn(1, 8, 1, 64), *caches))
    assert may_fuse(run.graph, CPU)
    (group,) = choose(raise_graph(run.graph), CPU).groups
    assert group.traffic.fused < group.traffic.written / 5


def test_what_is_fused_was_chosen_among_ways_with_a_bound() -> None:
    def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(attention(q, k, v), k, v)

    chosen = choose(raise_graph(graph_of(layers, 2200, 64)), CPU)
    assert len(chosen.groups) == 2
    one, together = (each for each in chosen.decisions if len(each.alternatives) > 1 and each.chosen != "as written")
    assert one.subject.endswith("and 1 like it")
    seconds = {each.what: each.value for each in one.alternatives}
    assert seconds["one kernel"] == min(seconds.values())
    whole = {each.what: each.value for each in together.alternatives}
    assert whole["as written"] == pytest.approx(2 * seconds["as written"])
    assert together.bound == pytest.approx(whole["together"])
    assert whole["together"] == pytest.approx(2 * seconds["one kernel"])


@pytest.mark.parametrize(("rows", "width"), [(20, 8), (48, 64)])
def test_a_graph_of_small_tensors_is_not_even_raised(rows: int, width: int) -> None:
    graph = graph_of(attention, rows, width)
    assert not may_fuse(graph, CPU)
    assert not choose(raise_graph(graph), CPU).groups


def test_products_that_take_the_time_stay() -> None:
    def network(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ up) @ down

    (run,) = record(network, (torch.randn(96, 2048), torch.randn(2048, 3000), torch.randn(3000, 2048)))
    assert not may_fuse(run.graph, CPU)
    assert not choose(raise_graph(run.graph), CPU).groups


def test_attention_by_a_library_has_nothing_to_save() -> None:
    chosen = choose(raise_graph(graph_of(library, 2200, 64)), CPU)
    assert not chosen.groups
    assert all("bytes only" in refused.why for refused in chosen.refused), chosen.refused


def test_rates_are_those_of_the_device() -> None:
    device = load_device("cpu")
    rates = Rates.of(device)
    assert rates.library == device.matrix_rate("f32") * device.efficiency_of("gemm")
    assert rates.moving(1e6, 1e6) < rates.moving(1e6, 1e9), "what fits into a cache moves faster"
    gpu = load_device("h100")
    assert gpu.efficiency_of("cascade") == gpu.efficiency_of("attention")


@pytest.mark.parametrize("device", list_devices())
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_products_are_priced_at_the_rate_of_their_operands(device: str, dtype: str) -> None:
    found = load_device(device)
    rates = Rates.of(found)
    count = 10**12
    stage = Traffic(0, 0, 0, count, count, other=() if dtype == "f32" else ((dtype, count, count),))
    assert rates.products(stage) == pytest.approx(count / (found.matrix_rate(dtype) * found.efficiency_of("gemm")))
    # Kernels for a CPU turn what is narrow into f32.
    made_in = "f32" if found.kind == "cpu" and dtype != "f64" else dtype
    assert rates.kernels(stage) == pytest.approx(count / (found.matrix_rate(made_in) * found.efficiency_of("cascade")))
    assert rates.written(stage) == pytest.approx(rates.products(stage))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_stage_knows_what_its_products_are_made_in(dtype: torch.dtype) -> None:
    (run,) = record(attention, [torch.randn(1, 2, 300, 16, dtype=dtype) for _ in range(3)])
    found = Candidates(with_own_copies(raise_graph(run.graph)), INDEXED)
    (stage,) = [t for each in components(found.space) for t in found.work_out(each).traffic]
    name = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}.get(dtype)
    assert stage.flops_written == 2 * 2 * 2 * 300 * 300 * 16
    assert stage.other == (((name, stage.flops_written, stage.flops_written),) if name else ())


def tables(layers: int, places: int, prices: TablePrices) -> list[Traffic]:
    """What the attention layers of a stack do that add one bias from a table to their scores."""

    def stack(x: torch.Tensor, table: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        distance = (torch.arange(200)[None] - torch.arange(200)[:, None]).abs().clamp(max=places - 1)
        bias = F.embedding(distance, table).permute(2, 0, 1)
        for q, k, v in zip(weights[::3], weights[1::3], weights[2::3], strict=True):
            x = torch.softmax((x @ q) @ (x @ k).transpose(-1, -2) + bias, -1) @ (x @ v)
        return x

    weights = (torch.randn(8, 8) for _ in range(3 * layers))
    (run,) = record(stack, (torch.randn(1, 2, 200, 8), torch.randn(places, 2), *weights))
    found = Candidates(with_own_copies(raise_graph(run.graph)), prices)
    return [each for component in components(found.space) for each in found.work_out(component).traffic]


def test_looking_up_costs_the_same_in_tables_of_any_size() -> None:
    small, large = (tables(2, places, INDEXED) for places in (16, 64))
    assert [t.flops_fused for t in small] == [t.flops_fused for t in large]
    assert any(t.flops_fused >= t.flops_written + INDEXED.lookup * 2 * 200 * 200 for t in small)
    fewer, more = (sum(t.flops_fused for t in tables(2, places, SEARCHED)) for places in (16, 64))
    assert more - fewer == 2 * SEARCHED.lookup * 2 * 200 * 200 * (64 - 16)


def test_what_layers_look_up_together_is_written_once() -> None:
    for layers in (1, 2, 3):
        assert sum(t.tables_written for t in tables(layers, 16, INDEXED)) == pytest.approx(
            INDEXED.written_lookup * 2 * 200 * 200, rel=1e-3
        )


def test_what_the_kernels_cost_decides_where_it_is_known() -> None:
    raised = raise_graph(graph_of(attention, 2200, 64))
    by_time = replace(CPU, wide_bytes=1 << 40)  # none is taken for its memory
    for price, taken in ((1e-9, True), (1e3, False)):
        chosen = choose(raised, replace(by_time, price=lambda fused, price=price: price))  # type: ignore[misc]
        assert bool(chosen.groups) == taken
        (decision,) = (each for each in chosen.decisions if each.alternatives[-1].what == "one kernel")
        assert decision.alternatives[-1].value == pytest.approx(price)
        assert (decision.chosen == "one kernel") == taken
    assert choose(raised, replace(by_time, price=lambda fused: None)).groups, "by the rates, where no price is known"
