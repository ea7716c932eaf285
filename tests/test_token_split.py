"""Token-wise splits, executed: some rows of a saved value are swapped, the others computed again, and joined."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import effcc
import pytest
import torch
from effcc import activation_planner, torch_internals
from effcc.budget_planning import BudgetPlanner
from effcc.joint_split import prefetches, split_saving
from effcc.passes.activation.candidates import Candidate, evaluate
from effcc.passes.activation.host_link import HostLink
from effcc.passes.activation.search import ActivationSearch
from effcc.runtime import host_tier
from effcc.summary import device_named
from models import Tower
from test_memory_budget import measured_peak
from torch import nn
from torch.testing import assert_close
from towers import unfused_step

pytestmark = pytest.mark.usefixtures("clean_compiler")

Choose = Callable[[ActivationSearch], Candidate]


@pytest.fixture(autouse=True)
def swap_directory(tmp_path: Path) -> Iterator[Path]:
    host_tier.set_directory(tmp_path)
    yield tmp_path
    host_tier.set_directory(None)


@contextlib.contextmanager
def splitting(choose: Choose) -> Iterator[list[tuple[Candidate, torch.fx.GraphModule]]]:
    """Joint graphs compiled inside are split by ``choose``; yields what was chosen, and the backward."""
    planner = BudgetPlanner(device_named("cpu"), swap=True)
    made: list[tuple[Candidate, torch.fx.GraphModule]] = []

    def partition(gm: torch.fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        planner.partition(gm, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
        graph = planner.graphs[-1]
        assert graph is not None
        problem, chosen = graph.search.problem, choose(graph.search)
        split = split_saving(
            graph.module, problem, chosen.saved, num_fwd_outputs, graph.static, chosen.swapped,
            prefetches(problem, chosen), chosen.shares,
        )  # fmt: skip
        made.append((chosen, split[1]))
        return split

    with torch_internals.joint_partitioner(partition):
        yield made


def every_divisible(quarters: int) -> Choose:
    """All that would be kept and can be split, is; the rest is kept."""

    def choose(search: ActivationSearch) -> Candidate:
        split = search.problem.divisible & search.plain.saved
        shares = frozenset((v, quarters) for v in split)
        found = evaluate(search.simulator, search.plain.saved - split, split, shares)
        assert len(found.shares) > 3
        return found

    return choose


def step_of(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model)
    torch._dynamo.reset()
    torch.manual_seed(5)
    compiled = torch.compile(model, backend="effcc", options={"cascades": False, "repeated_modules": False})
    loss = compiled(*inputs).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Pointwise(nn.Module):
    """Rows of three dimensions, and values that pointwise ops make: computed for some rows they have the same bits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.scale = nn.Parameter(torch.randn(1, 1, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        h = torch.sin(h) * self.scale + torch.cos(h).clamp(-0.5, 0.5)
        h = torch.where(h > 0, h.exp(), h * 3)
        return self.down(h.sigmoid() * h)


def test_what_runs_again_stands_where_it_is_needed_wherever_gradients_begin() -> None:
    graph = torch.fx.Graph()
    x, y = graph.placeholder("primals_1"), graph.placeholder("primals_2")
    gradient = graph.placeholder("tangents_1")
    early = graph.call_function(torch.ops.aten.mul.Tensor, (gradient, 2.0), name="early")
    first = graph.call_function(torch.ops.aten.exp.default, (x,), name="first")
    second = graph.call_function(torch.ops.aten.sin.default, (y,), name="second")
    total = graph.call_function(torch.ops.aten.add.Tensor, (first, second), name="total")
    of_first = graph.call_function(torch.ops.aten.mul.Tensor, (early, first), name="of_first")
    of_second = graph.call_function(torch.ops.aten.mul.Tensor, (of_first, second), name="of_second")
    graph.output((total, of_first, of_second))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4)
    graph.find_nodes(op="output")[0].meta["desc"] = [None, None, None]
    joint = torch.fx.GraphModule(torch.nn.Module(), graph)
    _, backward = torch_internals.split_joint(joint, [x, y], 1, [])
    order = [node.name for node in backward.graph.nodes if node.op == "call_function"]
    assert order.index("first") < order.index("of_first") < order.index("second") < order.index("of_second")


def pointwise_only(quarters: int) -> Choose:
    def choose(search: ActivationSearch) -> Candidate:
        problem = search.problem
        inlined = {v for v in problem.divisible if problem.ops[problem.values[v].op].inlined}
        # What pointwise ops make, with what products make kept: the rows' own ops are exact.
        read = problem.needed_by_backward()
        products = {v for v in problem.divisible if not problem.ops[problem.values[v].op].fused}
        split = frozenset(inlined & read)
        kept = (search.plain.saved | products) - split
        found = evaluate(search.simulator, frozenset(kept), split, frozenset((v, quarters) for v in split))
        assert found.shares
        return found

    return choose


def results(
    split: tuple[torch.fx.GraphModule, ...], given: dict[str, torch.Tensor], outputs: int
) -> list[torch.Tensor]:
    """What a split graph computes, run op by op: outputs of the forward, and results of the backward."""
    forward, backward = split
    made = forward(*(given[node.name] for node in forward.graph.find_nodes(op="placeholder")))
    inputs = backward.graph.find_nodes(op="placeholder")
    # A value that is swapped goes from one to the other as what tells where it is, in the same place.
    saved = iter(made[outputs:])
    values = [given[node.name] if node.name.startswith("tangent") else next(saved) for node in inputs]
    return [*made[:outputs], *(value for value in backward(*values) if value is not None)]


@pytest.mark.parametrize("choose", [*(pointwise_only(q) for q in (1, 2, 3))], ids=["1/4", "2/4", "3/4"])
def test_rows_have_the_bits_of_the_whole(choose: Choose) -> None:
    torch.manual_seed(0)
    model, x = Pointwise(), torch.randn(3, 20, 24)
    made: list[tuple[Any, Any, Any, int]] = []

    def partition(gm: torch.fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        planner = BudgetPlanner(device_named("cpu"), swap=True)
        plain = planner.partition(gm, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
        graph = planner.graphs[0]
        assert graph is not None
        joint, problem, chosen = graph.module, graph.search.problem, choose(graph.search)
        whole = split_saving(joint, problem, chosen.saved | chosen.swapped, num_fwd_outputs, graph.static)
        parted = split_saving(
            joint, problem, chosen.saved, num_fwd_outputs, graph.static, chosen.swapped, {}, chosen.shares
        )
        made.append((joint, whole, parted, num_fwd_outputs))
        return plain

    torch._dynamo.reset()
    with torch_internals.joint_partitioner(partition):
        torch.compile(model, backend="effcc", options={"cascades": False})(x)
    ((joint, whole, parted, outputs),) = made
    given = {node.name: torch.randn(node.meta["val"].shape) for node in joint.graph.find_nodes(op="placeholder")}
    expected, found = results(whole, given, outputs), results(parted, given, outputs)
    assert len(found) == len(expected) > outputs
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("quarters", [1, 3])
def test_pointwise_rows_compiled(quarters: int) -> None:
    torch.manual_seed(0)
    model, x = Pointwise(), (torch.randn(3, 20, 24),)
    loss, wanted = step_of(model, x)
    with splitting(pointwise_only(quarters)) as made:
        again, gradients = step_of(model, x)
    (chosen, backward), *_ = made
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    text = backward.print_readable(print_output=False)
    assert text.count("effcc.swap_in") == text.count("aten.cat") == len(chosen.shares)
    heads = [node for node in backward.graph.nodes if "swap_in" in str(node.target)]
    assert {node.meta["val"].shape[0] for node in heads} == {60 * quarters // 4}


@pytest.mark.slow
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_chains_with_products_and_norms(quarters: int) -> None:
    torch.manual_seed(0)
    model, x = Tower(width=32, depth=3), (torch.randn(64, 32),)
    loss, wanted = step_of(model, x)
    with splitting(every_divisible(quarters)) as made:
        again, gradients = step_of(model, x)
    chosen, backward = made[0]
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)
    names = {node.name for node in backward.graph.find_nodes(op="placeholder")}
    assert chosen.simulation.portions, "rows of the chains run again"
    assert len(names) > len(chosen.shares)


@pytest.mark.slow
def test_the_planner_splits_by_itself_where_the_host_has_little_room(
    monkeypatch: pytest.MonkeyPatch, swap_directory: Path
) -> None:
    """A disk so fast that all would be swapped, with room for a part, and products that are dear to compute again: the
    master problem takes shares of tokens."""
    torch.manual_seed(0)
    model, inputs = Tower(width=256, depth=4), {"x": torch.randn(512, 256)}
    exact = copy.deepcopy(model).double()
    exact(inputs["x"].double()).square().mean().backward()
    wanted = {name: p.grad for name, p in exact.named_parameters()}

    def step_with(room: int, budget: int | None) -> Callable[[], torch.Tensor]:
        fast = HostLink(out=1e15, back=1e15, latency=1e-12, capacity=room, overlapped=False)
        monkeypatch.setattr(activation_planner, "host_link", lambda device: fast)
        options = {} if budget is None else {"memory_budget": budget, "swap": True, "swap_dir": str(swap_directory)}
        return unfused_step(model, inputs, options)

    plain = measured_peak(model, inputs, step_with(0, None))
    budget = int(0.7 * plain)
    room = 3 << 20
    step = step_with(room, budget)
    step()
    choice = effcc.reports()[-1].activation
    assert choice is not None and choice.shares, "nothing was split"
    assert 0 < choice.swapped_bytes <= room
    assert any("/4 of" in row.fate for row in choice.rows)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_close(
            parameter.grad.double(), wanted[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert measured_peak(model, inputs, step) <= budget
    assert list(swap_directory.iterdir()) == []
