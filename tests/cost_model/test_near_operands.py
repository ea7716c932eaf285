"""Products that read again what was just read: what is near, and what it saves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from effcc.cost_model import roofline
from effcc.cost_model.devices import Cache, Device, Figure, GemmMeasurement, load_device
from effcc.cost_model.fusion import Kernel, kernel_of
from effcc.cost_model.near_operands import LastTouched, with_near_operands
from effcc.cost_model.product_cost import ProductLaw
from effcc.cost_model.roofline import Cost, kernel_cost
from effcc.cost_model.storages import storage_table
from effcc.cost_model.tensors import TensorTable
from effcc.cost_model.this_machine import machine
from effcc.ir.graph import Graph, Node, Ref
from effcc.ir.types import TensorType
from fresh_seed import fresh_random

LAW = ProductLaw(call=1e-6, per_flop=1e-11, left=1e-10, right=2e-10, result=1e-10)
MIB = 1 << 20


def figure(value: float) -> Figure:
    return Figure(value=value, source="test")


def device(cache: int, rate: float = 1e11) -> Device:
    """Memory at 10 GB/s, one cache."""
    shapes = [(m, k, n) for m in (8, 64, 512) for k in (32, 256) for n in (16, 1024)]
    rows = tuple(
        GemmMeasurement(
            library="blas", dtype="f32", layout="forward", m=m, k=k, n=n,
            rate=2.0 * m * k * n / LAW.seconds(1, m, k, n),
        )
        for m, k, n in shapes
    )  # fmt: skip
    return msgspec.structs.replace(
        load_device("cpu"),
        added={"exp": figure(1e-9)},
        ladder=(Cache(name="all", bytes=figure(1024.0), bandwidth=figure(1e10)),),
        caches=(Cache(name="L3", bytes=figure(float(cache)), bandwidth=figure(rate)),),
        gemm=rows,
        machine=machine(),
    )


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> float:
    """Compilation has timed each product at so many times what the law says."""

    def found(folder: Path, m: int, k: int, n: int, library: str) -> tuple[str, float]:
        return "blas", 3.0 * (LAW.seconds(1, m, k, n) - LAW.call)

    monkeypatch.setattr(roofline, "timed_product", found)
    return 3.0


def chain(steps: int, width: int, weights: int) -> tuple[list[Kernel], Graph]:
    """``steps`` products of 8 rows, which take turns with ``weights`` weights."""
    kind, square = TensorType("f32", (8, width)), TensorType("f32", (width, width))
    nodes = [Node("x", "input", type=kind, role="input")]
    nodes += [Node(f"w{i}", "input", type=square, role="input") for i in range(weights)]
    last = "x"
    made = []
    for i in range(steps):
        made.append(Node(f"y{i}", "aten.mm.default", (Ref(last), Ref(f"w{i % weights}")), (), kind))
        last = f"y{i}"
    graph = Graph("g", "inference", (*nodes, *made), (Ref(last),))
    storages = storage_table(graph, TensorTable(graph))
    kept = {s for node in made for s in storages.of[node.name]}
    return [kernel_of((node,), storages, kept) for node in made], graph


def priced(kernels: list[Kernel], graph: Graph, on: Device) -> tuple[list[Cost], list[Cost]]:
    table, storages = TensorTable(graph), storage_table(graph, TensorTable(graph))
    far = [kernel_cost(kernel, graph, on, table, storages) for kernel in kernels]
    return far, with_near_operands([*kernels], far, table, storages, on)


def test_what_has_room_is_what_was_touched_last() -> None:
    random = fresh_random()
    last, order = LastTouched(100), []
    for _ in range(200):
        value = random.randrange(12)
        size = 5 + 3 * value
        last.touch([(value, size)])
        order = [each for each in order if each[0] != value] + [(value, size)]
        while sum(size for _, size in order) > 100:
            order.pop(0)
        assert [each for each in range(12) if each in last] == sorted(value for value, _ in order)
        assert last.held == sum(size for _, size in order)


def test_weights_that_are_read_again_are_not_timed_ones(timed: float) -> None:
    width = 256
    kernels, graph = chain(6, width, weights=2)
    far, near = priced(kernels, graph, device(cache=8 * MIB))
    assert near[:2] == far[:2], "nobody has read these weights before"
    lawful = LAW.seconds(1, 8, width, width) - LAW.call
    for before, after in zip(far[2:], near[2:], strict=True):
        assert before.seconds - after.seconds == pytest.approx((timed - 1) * lawful, rel=1e-3)


@pytest.mark.parametrize(("cache", "rate"), [(MIB, 1e11), (8 * MIB, 9e9)])
def test_weights_come_from_memory_where_no_faster_cache_holds_them(cache: int, rate: float, timed: float) -> None:
    assert timed > 1
    kernels, graph = chain(6, 256, weights=2)
    far, near = priced(kernels, graph, device(cache, rate))
    assert near == far


def test_a_private_cache_holds_more_of_what_was_touched_last(timed: float) -> None:
    """Two weights of 256 KiB are more than a quarter of a MiB, and less than three quarters of it."""
    kernels, graph = chain(6, 256, weights=2)
    last = Cache(name="L3", bytes=figure(2.0 * MIB), bandwidth=figure(9e9))
    on = device(cache=MIB)
    _, without = priced(kernels, graph, on)
    far, near = priced(kernels, graph, msgspec.structs.replace(on, caches=(last, *on.caches)))
    assert without == far and timed > 1
    assert all(after.seconds < before.seconds for before, after in zip(far[2:], near[2:], strict=True))


def test_what_is_added_comes_at_the_rate_of_the_cache() -> None:
    width, rate = 256, 5e10
    square = TensorType("f32", (width, width))
    names = ("sum", "a", "b")
    inputs = [Node(name, "input", type=square, role="input") for name in names]
    made = [Node(f"y{i}", "aten.addmm.default", tuple(map(Ref, names)), (), square) for i in range(2)]
    graph = Graph("g", "inference", (*inputs, *made), (Ref("y0"), Ref("y1")))
    storages = storage_table(graph, TensorTable(graph))
    kept = {s for node in made for s in storages.of[node.name]}
    far, near = priced([kernel_of((node,), storages, kept) for node in made], graph, device(8 * MIB, rate))
    moved = 3 * 4 * width * width
    assert near[0] == far[0]
    assert far[1].seconds - near[1].seconds == pytest.approx(moved / 1e10 - moved / rate, rel=1e-3)


def test_a_kernel_of_which_nothing_is_known_stays_as_it_is(timed: float) -> None:
    assert timed > 1
    kernels, graph = chain(3, 128, weights=1)
    table, storages, on = TensorTable(graph), storage_table(graph, TensorTable(graph)), device(cache=8 * MIB)
    costs = [kernel_cost(kernel, graph, on, table, storages) for kernel in kernels]
    found = with_near_operands([kernels[0], None, kernels[2]], costs, table, storages, on)
    assert found[:2] == costs[:2] and found[2].seconds < costs[2].seconds
