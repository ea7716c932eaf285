"""Costs on a calibrated CPU: laws that are found again, additions by op, bandwidth between rungs, bounds of a plan."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from operator import mul
from pathlib import Path

import msgspec
import pytest
import torch
from effcc.calibrating import begin_cascades, together
from effcc.cost_model import cpu_kernels, generated_probes
from effcc.cost_model.calibrate import calibrate
from effcc.cost_model.cascade_cost import map_seconds
from effcc.cost_model.devices import Cache, Device, Figure, GemmMeasurement, load_device, parse_device
from effcc.cost_model.flops import contraction_flop
from effcc.cost_model.gemm_measurement import keep_measurements, machine_name
from effcc.cost_model.library_laws import LAWS, convolution_law, fit_law, law_seconds, names_of
from effcc.cost_model.op_additions import added_seconds
from effcc.cost_model.product_cost import ProductLaw, chosen_library, fit, timed_product
from effcc.cost_model.roofline import bandwidth, op_cost
from effcc.cost_model.step_bounds import step_bounds, stream_loads
from effcc.cost_model.tensors import TensorTable
from effcc.ir.cascade_parser import parse_cascade
from effcc.ir.graph import Graph, Node, Ref
from effcc.ir.plan import Buffer, Step
from effcc.ir.types import TensorType
from fresh_seed import fresh_random
from sample_plan import MIB, make_sample
from sympy import count_ops

LAW = ProductLaw(call=2e-6, per_flop=1e-11, left=1e-10, right=2e-10, result=3e-10)


def measured(law: ProductLaw, library: str, shapes: list[tuple[int, int, int]]) -> list[GemmMeasurement]:
    rates = [2.0 * m * k * n / law.seconds(1, m, k, n) for m, k, n in shapes]
    return [
        GemmMeasurement(library=library, dtype="f32", layout="forward", m=m, k=k, n=n, rate=rate)
        for (m, k, n), rate in zip(shapes, rates, strict=True)
    ]


def calibrated(**more: object) -> Device:
    """The generic CPU with figures that are easy to add up: 1 GB/s at 1 MiB, 4 GB/s at 4 MiB."""

    def figure(value: float) -> Figure:
        return Figure(value=value, source="test")

    rungs = ((1 << 20, 1e9), (4 << 20, 4e9))
    return msgspec.structs.replace(
        load_device("cpu"),
        added={"exp": figure(1e-9), "sum": figure(2e-9), "mean": figure(5e-9), "tanh": figure(3e-9)},
        ladder=tuple(Cache(name=str(size), bytes=figure(float(size)), bandwidth=figure(rate)) for size, rate in rungs),
        launch=figure(1e-6),
        library_call=figure(2e-6),
        **more,
    )


def one_op(op: str, shape: tuple[int, ...], out: tuple[int, ...], *args: object) -> Graph:
    x = Node("x", "input", type=TensorType("f32", shape), role="input")
    y = Node("y", op, (Ref("x"), *args), (), TensorType("f32", out))
    return Graph("g", "inference", (x, y), (Ref("y"),))


def seconds(graph: Graph, device: Device) -> float:
    return op_cost(graph.by_name()["y"], graph, device).seconds


def test_a_law_is_found_again_from_its_own_products() -> None:
    draw = fresh_random()
    shapes = [tuple(2 ** draw.randint(4, 11) for _ in range(3)) for _ in range(40)]
    found = fit(measured(LAW, "blas", shapes))  # type: ignore[arg-type]
    for m, k, n in ((100, 300, 700), (1, 1024, 1024), (4096, 64, 128)):
        assert found.seconds(1, m, k, n) == pytest.approx(LAW.seconds(1, m, k, n), rel=1e-6)


def test_coefficients_are_never_negative() -> None:
    shapes = [(2**i, 2**j, 256) for i in range(5, 9) for j in (6, 9)]
    rows = measured(ProductLaw(0.0, 1e-11, 0.0, 0.0, 0.0), "blas", shapes)
    rows = [msgspec.structs.replace(row, rate=row.rate * (1 + 0.1 * (-1) ** at)) for at, row in enumerate(rows)]
    law = fit(rows)
    assert min(law.call, law.per_flop, law.left, law.right, law.result) >= 0 and law.per_flop > 0


def test_the_library_is_the_one_that_compilation_would_take() -> None:
    shapes = [(2**i, 2**j, 2**k) for i in (5, 8, 11) for j in (6, 9) for k in (7, 10)]
    fast = ProductLaw(0.0, 0.5e-11, 0.0, 0.0, 0.0)
    device = calibrated(gemm=(*measured(LAW, "blas", shapes), *measured(fast, "onednn", shapes)))
    assert chosen_library(device, "f32", 1, 512, 512, 512) == ("onednn", pytest.approx(2 * 512**3 * 0.5e-11))
    # Below the size that is measured at all, and for batches, BLAS.
    assert chosen_library(device, "f32", 1, 16, 16, 16)[0] == "blas"  # type: ignore[index]
    assert chosen_library(device, "f32", 4, 512, 512, 512)[0] == "blas"  # type: ignore[index]


def test_a_library_that_is_asked_for_has_its_own_prices(tmp_path: Path) -> None:
    shapes = [(2**i, 2**j, 2**k) for i in (5, 8, 11) for j in (6, 9) for k in (7, 10)]
    fast = ProductLaw(0.0, 0.5e-11, 0.0, 0.0, 0.0)
    device = calibrated(gemm=(*measured(LAW, "blas", shapes), *measured(fast, "onednn", shapes)))
    assert chosen_library(msgspec.structs.replace(device, library="blas"), "f32", 1, 512, 512, 512) == (
        "blas",
        pytest.approx(LAW.seconds(1, 512, 512, 512) - LAW.call, rel=1e-6),
    )
    assert chosen_library(msgspec.structs.replace(device, library="onednn"), "f32", 1, 512, 512, 512)[0] == "onednn"  # type: ignore[index]
    assert chosen_library(msgspec.structs.replace(device, library="onednn"), "f32", 4, 512, 512, 512)[0] == "blas"  # type: ignore[index]
    timed = {"512x256x128 nn": {"blas": 2e-3, "onednn": 3e-3}}
    keep_measurements(tmp_path / "gemm.json", machine_name(), timed)
    found = [timed_product(tmp_path, 512, 256, 128, asked) for asked in ("", "blas", "onednn")]
    assert found == [("blas", pytest.approx(2e-3)), ("blas", pytest.approx(2e-3)), ("onednn", pytest.approx(3e-3))]


def test_bandwidth_lies_between_its_rungs() -> None:
    device = calibrated()
    assert bandwidth(1 << 10, "pointwise", device) == 1e9
    assert bandwidth(2 << 20, "pointwise", device) == pytest.approx(2e9)
    assert bandwidth(1 << 30, "pointwise", device) == 4e9


def test_ops_add_what_was_measured_of_them() -> None:
    device, n = calibrated(), 1 << 18
    plain = seconds(one_op("aten.neg.default", (n,), (n,)), device)
    moved = 8 * n
    assert plain == pytest.approx(1e-6 + moved / bandwidth(moved, "pointwise", device))
    assert seconds(one_op("aten.exp.default", (n,), (n,)), device) - plain == pytest.approx(n * 1e-9)
    rows = one_op("aten.sum.dim_IntList", (512, 512), (512,), (-1,))
    columns = one_op("aten.sum.dim_IntList", (512, 512), (512,), (0,))
    assert seconds(columns, device) - seconds(rows, device) == pytest.approx(n * 3e-9)
    square, root = (one_op("aten.pow.Tensor_Scalar", (n,), (n,), each) for each in (2, 2.5))
    table = TensorTable(root)
    assert seconds(square, device) == pytest.approx(plain)
    assert added_seconds(root.by_name()["y"], table, {"pow": Figure(value=1e-8, source="")}) == pytest.approx(n * 1e-8)


def test_large_results_pay_for_fresh_pages() -> None:
    n = 16 << 20
    graph = one_op("aten.neg.default", (n,), (n,))
    fresh = calibrated(fresh=Figure(value=1e-10, source="test"))
    assert seconds(graph, fresh) - seconds(graph, calibrated()) == pytest.approx(4 * n * 1e-10)


def test_a_calibrated_device_is_read_back() -> None:
    device = calibrated(fresh=Figure(value=1e-10, source="test"))
    assert parse_device(msgspec.json.encode(device)) == device


def test_what_is_measured_is_of_the_right_size() -> None:
    ladder = cpu_kernels.bandwidth_ladder(cpu_kernels.walking_seconds(0.05))
    assert tuple(ladder) == cpu_kernels.RUNGS and all(1e8 < rate < 1e13 for rate in ladder.values())
    cases = cpu_kernels.law_cases()
    laws = cpu_kernels.library_laws(cases, cpu_kernels.law_seconds(cases, 0.05), 1e-6)
    assert set(laws) == {name for kind in LAWS for backward in (False, True) for name in names_of(kind, backward)}
    assert all(0 <= coefficient < 1e-2 for coefficient in laws.values()) and any(laws.values())
    assert 0 <= cpu_kernels.fresh_seconds(0.01) < 1e-8


@pytest.mark.slow
def test_generated_kernels_are_told_apart() -> None:
    probes = generated_probes.prepare_probes(together)
    assert probes is not None
    taken = generated_probes.probe_seconds(probes, 1.0)
    assert taken is not None
    found = generated_probes.generated_kernels(taken)
    assert set(found.added) == set(generated_probes.ops()) - {"add"} | {"turn"} | set(generated_probes.draws())
    assert found.added["rand"] > 5 * found.added["statement"] and found.added["randn"] > found.added["statement"]
    assert found.added["pow"] > found.added["rsqrt"] and found.added["tanh"] > found.added["div"]
    assert 0 < found.call < 1e-3 and 0 < found.library < 1e-3 and 0 <= found.graph < 1e-1


@pytest.mark.slow
def test_kernels_that_are_put_off_compute_once_they_are_compiled() -> None:
    x = torch.rand(1000)
    graphs = [torch.compile(graph, dynamic=False) for graph in (lambda x: x.exp() + 1.0, lambda x: (x * x).sum())]
    with together() as finish, torch.no_grad():
        for graph in graphs:
            graph(x)
        finish()
    with torch.no_grad():
        torch.testing.assert_close(graphs[0](x), x.exp() + 1.0)
        torch.testing.assert_close(graphs[1](x), (x * x).sum())


def test_without_a_compiler_generated_kernels_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    @contextlib.contextmanager
    def refused() -> Iterator[Callable[[], None]]:
        raise RuntimeError("no compiler")
        yield lambda: None

    with caplog.at_level("INFO", logger="effcc.calibrate"):
        assert generated_probes.prepare_probes(refused) is None
    assert "generated kernels were not measured: RuntimeError: no compiler" in caplog.text


def test_a_mistake_in_the_probes_is_not_taken_for_a_missing_compiler() -> None:
    @contextlib.contextmanager
    def mistaken() -> Iterator[Callable[[], None]]:
        raise TypeError("a mistake")
        yield lambda: None

    with pytest.raises(TypeError, match="a mistake"):
        generated_probes.prepare_probes(mistaken)


def test_bounds_of_a_plan_by_hand() -> None:
    bounds = step_bounds(make_sample())
    assert bounds.seconds == bounds.bound == pytest.approx(4e-5) and bounds.gap == pytest.approx(0, abs=1e-9)
    assert bounds.longest_chain == pytest.approx(4e-5)
    assert bounds.peak == 4 * MIB == bounds.peak_bound


def test_streams_count_what_runs_beside_them() -> None:
    steps = (
        Step(id=0, kind="kernel", name="a", phase="forward", seconds=4.0),
        Step(id=1, kind="swap_out", name="c", phase="forward", stream="copy out", start=3.0, seconds=3.0),
        Step(id=2, kind="kernel", name="b", phase="forward", start=4.0, seconds=1.0),
    )
    compute, copies = stream_loads(steps)
    assert (compute.busy, compute.alone) == (5.0, 3.0) and (copies.busy, copies.alone) == (3.0, 1.0)


def test_a_chain_bounds_two_streams() -> None:
    sample = make_sample()
    steps = (
        Step(id=0, kind="kernel", name="a", phase="inference", writes=(2,), seconds=2.0),
        Step(id=1, kind="swap_out", name="o", phase="inference", stream="copy out", reads=(2,), start=2.0, seconds=5.0),
        Step(id=2, kind="kernel", name="b", phase="inference", reads=(2,), writes=(3,), start=7.0, seconds=1.0),
    )
    plan = msgspec.structs.replace(sample, steps=steps, seconds=8.0)
    bounds = step_bounds(plan)
    assert bounds.longest_chain == 7.0 and bounds.busiest == 5.0
    assert bounds.bound == 7.0 and math.isclose(bounds.gap, 1 / 8)


def test_buffers_that_nothing_uses_count_from_the_start() -> None:
    unused = Buffer(id=9, name="z", bytes=MIB, lower=0, upper=2, role="buffer")
    plan = msgspec.structs.replace(make_sample(), buffers=(*make_sample().buffers, unused))
    assert step_bounds(plan).peak_bound == 5 * MIB


def test_a_cascade_costs_its_maps_beside_its_products() -> None:
    """exp(S - M) and the sum of it: two and one operations on vectors of eight, and an exponential, for each point."""
    cascade = parse_cascade("S[m,n] = sum[d] Q[m,d] * K[n,d]\nE[m,n] = exp(S[m,n] - 2)\nD[m] = sum[n] E[m,n]\n")
    added = {"statement": Figure(value=8e-9, source="test"), "exp": Figure(value=3e-9, source="test")}
    points = 6 * 10
    operations = count_ops(cascade.einsums[1].body) + 1 + 1  # of exp(S - 2), of D's own element, of its addition
    found = map_seconds(cascade, {"m": 6, "n": 10, "d": 4}, added, lanes=8)
    assert found == pytest.approx(points * (operations * 1e-9 + 3e-9))
    assert map_seconds(cascade, {"m": 6, "n": 10, "d": 4}, {}, lanes=8) == 0.0


@pytest.mark.slow
def test_products_in_cascades_are_measured() -> None:
    share = begin_cascades()()
    assert share is not None
    assert 0 < share(calibrate(0.5, save=False, generated=False), 0.5) < 3


def test_grouped_products_take_as_long_as_their_products() -> None:
    shapes = [(m, k, n) for m in (16, 64, 256) for k in (32, 256) for n in (64, 512)]
    device = calibrated(gemm=tuple(measured(LAW, "blas", shapes)))
    kinds = {
        "x": TensorType("f32", (512, 256)),
        "w": TensorType("f32", (4, 256, 1280)),
        "ends": TensorType("i32", (4,)),
    }
    nodes = [Node(name, "input", type=kind, role="input") for name, kind in kinds.items()]
    out = Node(
        "out", "transformers.grouped_mm_fallback.default", tuple(map(Ref, kinds)), (), TensorType("f32", (512, 1280))
    )
    graph = Graph("g", "inference", (*nodes, out), (Ref("out"),))
    one = LAW.seconds(1, 128, 256, 1280)
    zeros = 2 * 512 * 1280 * 4 / 1e9  # at no less than 1 GB/s
    assert 4 * one < op_cost(out, graph, device).seconds < 4 * (one + 1e-6) + zeros + 2e-6
    slower = msgspec.structs.replace(device, added=dict(device.added) | {"turn": Figure(value=1e-4, source="test")})
    assert op_cost(out, graph, slower).seconds > 4e-4


def test_laws_are_found_again_from_their_own_ops() -> None:
    draw = fresh_random()
    for kind in LAWS:
        for backward in (False, True):
            true = [10 ** draw.uniform(-12, -9) for _ in LAWS[kind]]
            parts = [tuple(draw.uniform(1e3, 1e6) for _ in true) for _ in range(12)]
            found = fit_law(kind, backward, parts, [sum(map(mul, true, row)) for row in parts])  # type: ignore[arg-type]
            assert list(found.values()) == pytest.approx(true, rel=1e-6)


def test_convolutions_of_other_kinds_have_other_laws() -> None:
    assert convolution_law((2, 8, 10, 10), (2, 4, 10, 10), (8, 4, 3, 3)) == "convolution"
    assert convolution_law((2, 8, 10, 10), (2, 4, 10, 10), (4, 8, 3, 3)) == "convolution"  # transposed
    assert convolution_law((2, 8, 10, 10), (2, 8, 10, 10), (8, 1, 3, 3)) == "grouped_convolution"
    assert convolution_law((2, 8, 10, 10), (2, 4, 10, 10), (8, 2, 3, 3)) == "grouped_convolution"
    assert convolution_law((2, 8, 10), (2, 8, 10), (8, 1, 3)) == "sequence_convolution"
    assert convolution_law((2, 1, 10, 10), (2, 1, 10, 10), (1, 1, 3, 3)) == "convolution"


def test_attention_and_convolution_cost_what_their_laws_say() -> None:
    names = (*enumerate(names_of("attention", False), 9), *enumerate(names_of("convolution", True), 9))
    figures = {name: Figure(value=10.0**-power, source="test") for power, name in names}
    query, key = TensorType("f32", (2, 4, 600, 16)), TensorType("f32", (2, 4, 700, 16))
    nodes = [Node(n, "input", type=t, role="input") for n, t in (("q", query), ("k", key), ("v", key))]
    attend = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    for causal, pairs in ((False, 600 * 700), (True, 600 * 512 + 88 * 188)):
        y = Node("y", attend, (Ref("q"), Ref("k"), Ref("v"), 0.0, causal), (), query)
        table = TensorTable(Graph("g", "inference", (*nodes, y), (Ref("y"),)))
        expected = 1e-9 + 8 * (pairs * (1e-10 + 16 * 1e-11) + 1300 * 16 * 1e-12)
        assert law_seconds(y, table, figures) == pytest.approx(expected)
    shapes = {"gradient": (2, 8, 10, 10), "x": (2, 4, 10, 10), "w": (8, 4, 3, 3)}
    kinds = {name: TensorType("f32", shape) for name, shape in shapes.items()}
    nodes = [Node(name, "input", type=kind, role="input") for name, kind in kinds.items()]
    rest = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False))
    back = Node("y", "aten.convolution_backward.default", (*map(Ref, kinds), *rest), (), kinds["x"])
    table = TensorTable(Graph("g", "backward", (*nodes, back), (Ref("y"),)))
    flop = contraction_flop(back, table)
    assert flop >= 2 * 1600 * 36
    assert law_seconds(back, table, figures) == pytest.approx(1e-9 + flop * 1e-10 + (1600 + 800) * 1e-11 + 288 * 1e-12)
