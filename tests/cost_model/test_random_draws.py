"""Random numbers cost the same wherever they are drawn: alone, inside a kernel that reads them, and drawn again."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch
from effcc import torch_internals
from effcc.cost_model.devices import Device, Figure, load_device
from effcc.cost_model.fusion import group_kernels
from effcc.cost_model.generated_loops import issued_seconds, loops_of
from effcc.cost_model.random_draws import OPERATIONS, draw_seconds, drawn
from effcc.cost_model.roofline import fused_seconds, kernel_cost, op_cost
from effcc.cost_model.storages import storage_table
from effcc.cost_model.tensors import TensorTable
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.passes.activation.cut import PricedCuts
from effcc.passes.activation.problem import JointProblem, joint_problem
from effcc.passes.activation.simulate import Simulator

ROWS, WIDTH = 512, 256
NUMBERS = ROWS * WIDTH
DROPOUT = """graph @joint phase=joint {
  %x: f32[512,256] = input()  role(input)
  %seed: i64[] = input()  role(input)
  %w: f32[256,256] = input()  role(parameter)
  %t: f32[512,256] = input()  role(tangent)
  %r: f32[512,256] = prims.inductor_random.default([512, 256], %seed, "rand")
  %m: b1[512,256] = aten.gt.Scalar(%r, 0.1)
  %y: f32[512,256] = aten.mul.Tensor(%x, %m)
  %z: f32[512,256] = aten.mm.default(%y, %w)
  %d: f32[512,256] = aten.mm.default(%t, %w)
  %g: f32[512,256] = aten.mul.Tensor(%d, %m)
  return (%z, %g)
}
"""


def calibrated(**figures: float) -> Device:
    """The generic CPU with a statement of 0.1 ns, booleans of 1 ns, and these figures."""
    added = {"statement": 1e-10, "mask_write": 1e-9, "mask_read": 1e-9, "exp": 2e-9, **figures}
    return msgspec.structs.replace(
        load_device("cpu"), added={name: Figure(value=value, source="test") for name, value in added.items()}
    )


def drawing(op: str, kind: str = "f32[512,256]") -> Graph:
    return parse_graph(f"graph @g phase=inference {{\n  %s: i64[] = input()\n  %y: {kind} = {op}\n  return (%y)\n}}\n")


def joint(device: Device) -> JointProblem:
    return joint_problem(parse_graph(DROPOUT), device, 1)


@pytest.mark.parametrize(
    ("op", "kind", "figure"),
    [
        ('prims.inductor_random.default([512, 256], %s, "rand")', "f32[512,256]", "rand"),
        ('prims.inductor_random.default([512, 256], %s, "randn")', "f32[512,256]", "randn"),
        ("prims.inductor_randint.default(0, 9, [512, 256], %s)", "i64[512,256]", "randint"),
        ("aten.rand.default([512, 256])", "f32[512,256]", "rand"),
        ("aten.randn.default([512, 256])", "f32[512,256]", "randn"),
        ("aten.full.default([512, 256], 1.0)", "f32[512,256]", None),
    ],
)
def test_ops_that_draw_are_known(op: str, kind: str, figure: str | None) -> None:
    graph = drawing(op, kind)
    found = drawn(graph.by_name()["y"], TensorTable(graph))
    assert found == (None if figure is None else (figure, NUMBERS))


def test_a_draw_costs_what_was_measured_alone_and_within_a_kernel() -> None:
    dear, free = calibrated(rand=5e-9), calibrated(rand=1e-20)
    graph = parse_graph(DROPOUT)
    by_name, table = graph.by_name(), TensorTable(graph)
    alone = [op_cost(by_name["r"], graph, device).seconds for device in (dear, free)]
    assert alone[0] - alone[1] == pytest.approx(NUMBERS * 5e-9)
    storages = storage_table(graph, table)
    (kernel,) = group_kernels([by_name[name] for name in "rmy"], graph, table, storages)
    within = [kernel_cost(kernel, graph, device, table, storages).seconds for device in (dear, free)]
    assert within[0] - within[1] == pytest.approx(NUMBERS * 5e-9)
    again = [fused_seconds(by_name["r"], graph, device, table, 0.5) for device in (dear, free)]
    assert again[0] - again[1] == pytest.approx(NUMBERS * 5e-9), "fused it has less traffic, and as many numbers"


def test_draws_that_were_not_measured_take_statements() -> None:
    statement = {"statement": Figure(value=1e-10, source="test")}
    assert draw_seconds("randn", 1000, statement) == pytest.approx(1000 * OPERATIONS * 1e-10)
    uniform = {"rand": Figure(value=3e-9, source="test"), **statement}
    assert draw_seconds("randint", 1000, uniform) == pytest.approx(3e-6)
    assert draw_seconds("rand", 1000, {}) == 0.0


def test_on_a_device_that_is_not_calibrated_a_draw_is_work_for_its_vector_units() -> None:
    for name in ("cpu", "h100"):
        device = load_device(name)
        graph = drawing("aten.rand.default([65536, 256])", "f32[65536,256]")
        work = 65536 * 256 * OPERATIONS / device.vector_rate("f32")
        assert op_cost(graph.by_name()["y"], graph, device).seconds >= work
        assert fused_seconds(graph.by_name()["y"], graph, device, TensorTable(graph), 0.5) >= work


def source_of(function: Callable[[torch.Tensor], object], x: torch.Tensor) -> str:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch.no_grad():
        _, sources = run_and_get_code(torch.compile(function), x)
    return str(sources[0])


def draws_in(function: Callable[[torch.Tensor], object], x: torch.Tensor) -> dict[str, int]:
    found: dict[str, int] = {}
    for nest in (nest for kernel in loops_of(source_of(function, x)).values() for nest in kernel):
        for name, count in nest.draws.items():
            found[name] = found.get(name, 0) + count
    return found


@pytest.mark.slow
@torch_internals.without_code_cache()
def test_numbers_are_counted_in_what_inductor_writes() -> None:
    """Of a length that no vector divides: the last one draws for all of its lanes. Masks are stored for the caller, or
    gone once they are read."""
    x = torch.rand(63, 45)

    def stored(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.rand_like(x) > 0.1
        return x * mask, mask

    def summed(x: torch.Tensor) -> torch.Tensor:
        return (x * torch.rand_like(x)).sum(-1) + torch.randn(63)

    for function in (lambda x: x * (torch.rand_like(x) > 0.1), stored, torch.rand_like, summed):
        found = draws_in(function, x)
        assert set(found) == ({"rand", "randn"} if function is summed else {"rand"})
        rows = 63 if function is summed else 1
        assert x.numel() <= found["rand"] < x.numel() + 16 * rows
        assert 63 <= found.get("randn", 63) < 63 + 16


@torch_internals.without_code_cache()
def test_a_loop_that_draws_takes_the_figure_for_each_number() -> None:
    x = torch.rand(64, 48)
    (kernel,) = (k for k in loops_of(source_of(lambda x: x * torch.rand_like(x), x)).values() if k[-1].draws)
    dear, free = calibrated(rand=5e-9), calibrated(rand=1e-20)
    both = [sum(issued_seconds(nest, device.added) for nest in kernel) for device in (dear, free)]
    assert both[0] - both[1] == pytest.approx(x.numel() * 5e-9)


def test_a_number_or_its_mask_is_kept_where_a_draw_is_dear_and_drawn_again_where_it_is_not() -> None:
    for price, kept in ((1e-7, True), (1e-12, False)):
        problem = joint(calibrated(rand=price))
        fastest = PricedCuts(Simulator(problem)).best(None, 0.0)
        either = {problem.of["r"][0], problem.of["m"][0]}
        assert bool(either & fastest.saved) == kept, f"a draw of {price} s"
        draw = next(op for op in problem.ops if op.name == "r")
        assert draw.seconds >= NUMBERS * price


def test_keeping_a_mask_costs_what_its_lanes_take() -> None:
    device = calibrated()
    problem = joint(device)
    mask, drawn_value = (problem.values[problem.of[name][0]] for name in "mr")
    per_byte = drawn_value.keep_seconds / drawn_value.bytes
    assert mask.keep_seconds - mask.bytes * per_byte == pytest.approx(NUMBERS * 2e-9)
