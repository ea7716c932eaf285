"""Products that read again what was just read: what is near, and what it saves."""

from __future__ import annotations

import msgspec
import pytest
from effcc.cost_model.devices import Cache, Device, Figure, GemmMeasurement, load_device
from effcc.cost_model.fusion import Kernel, kernel_of
from effcc.cost_model.near_operands import LastTouched, with_near_operands
from effcc.cost_model.product_cost import ProductLaw
from effcc.cost_model.roofline import Cost, kernel_cost
from effcc.cost_model.storages import storage_table
from effcc.cost_model.tensors import TensorTable
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
    )


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


def test_weights_that_are_read_again_come_from_the_cache() -> None:
    width = 256
    kernels, graph = chain(6, width, weights=2)
    far, near = priced(kernels, graph, device(cache=8 * MIB, rate=1.5e10))
    assert near[:2] == far[:2], "nobody has read these weights before"
    read = 4 * (width * width + 8 * width)
    for before, after in zip(far[2:], near[2:], strict=True):
        assert before.seconds - after.seconds == pytest.approx(read / 1e10 - read / 1.5e10, rel=1e-3)


def test_weights_that_do_not_fit_come_from_memory() -> None:
    kernels, graph = chain(6, 256, weights=2)
    far, near = priced(kernels, graph, device(cache=MIB))
    assert near == far


def test_a_product_takes_no_less_than_its_operations() -> None:
    kernels, graph = chain(4, 512, weights=1)
    on = msgspec.structs.replace(device(cache=64 * MIB), ladder=())
    slow = msgspec.structs.replace(on, ladder=(Cache(name="all", bytes=figure(1024.0), bandwidth=figure(1e7)),))
    _, near = priced(kernels, graph, slow)
    assert all(cost.seconds >= 2 * 8 * 512 * 512 * LAW.per_flop * (1 - 1e-6) for cost in near)


def test_a_kernel_of_which_nothing_is_known_stays_as_it_is() -> None:
    kernels, graph = chain(3, 128, weights=1)
    table, storages, on = TensorTable(graph), storage_table(graph, TensorTable(graph)), device(cache=8 * MIB)
    costs = [kernel_cost(kernel, graph, on, table, storages) for kernel in kernels]
    found = with_near_operands([kernels[0], None, kernels[2]], costs, table, storages, on)
    assert found[:2] == costs[:2] and found[2].seconds < costs[2].seconds
