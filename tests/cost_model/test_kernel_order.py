"""The order of kernels: against every order of small graphs, the bound, and as Inductor's kernels really run."""

from __future__ import annotations

import itertools
import random
import re

import effcc
import pytest
import torch
from effcc.codegen.kernel_order import order_in
from effcc.cost_model import kernel_order as orders
from effcc.cost_model.kernel_order import OrderProblem, Value, choose_order, lower_bound, peak_of, use_over
from fresh_seed import fresh_random
from kernel_orders import legal

MIB = 1 << 20


def random_problem(rng: random.Random, count: int, inputs: int = 2) -> OrderProblem:
    """Each kernel makes a value and reads some of those before it."""
    made: list[tuple[int, int, list[int]]] = [(rng.randint(1, 9) * MIB, -1, []) for _ in range(inputs)]
    before: list[tuple[int, ...]] = []
    for kernel in range(count):
        read = rng.sample(range(len(made)), min(len(made), rng.randint(1, 3)))
        for each in read:
            made[each][2].append(kernel)
        before.append(tuple(sorted({made[each][1] for each in read if made[each][1] >= 0})))
        made.append((rng.randint(1, 9) * MIB, kernel, []))
    values = tuple(Value(size, maker, tuple(used), kept=not used) for size, maker, used in made)
    return OrderProblem(count, tuple(before), values)


def test_held_bytes_are_counted_by_hand() -> None:
    # x (4, given) -> a (2) -> b (1, kept); a is freed after b, x after a.
    problem = OrderProblem(2, ((), (0,)), (Value(4, -1, (0,)), Value(2, 0, (1,)), Value(1, 1, (), kept=True)))
    assert use_over(problem, (0, 1)) == [6, 3]
    assert lower_bound(problem) == 6


def test_small_graphs_get_the_best_of_all_orders() -> None:
    rng = fresh_random()
    improved = 0
    for _ in range(12):
        problem = random_problem(rng, rng.randint(4, 7))
        every = [order for order in itertools.permutations(range(problem.count)) if legal(problem, order)]
        best = min(peak_of(problem, order) for order in every)
        given = max(every, key=lambda order: peak_of(problem, order))
        answer = choose_order(problem, given)
        assert legal(problem, answer.order)
        assert peak_of(problem, answer.order) == answer.peak == best
        assert answer.bound <= best and answer.given == peak_of(problem, given)
        assert lower_bound(problem) <= best
        improved += best < answer.given
    assert improved


def test_long_graphs_never_get_a_worse_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "EFFORT", 0.05)
    monkeypatch.setattr(orders, "WINDOW", 12)
    problem = random_problem(fresh_random(), 40)
    given = tuple(range(40))
    answer = choose_order(problem, given)
    assert sorted(answer.order) == list(given) and legal(problem, answer.order)
    assert answer.bound <= answer.peak <= answer.given == peak_of(problem, given)
    assert answer == choose_order(problem, given)  # again the same


def test_without_ortools_the_given_order_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "solve_window", lambda *_: None)
    problem = random_problem(fresh_random(), 9)
    answer = choose_order(problem, tuple(range(9)))
    assert answer.order == tuple(range(9)) and answer.peak == answer.given


def wide_then_narrow(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Products that widen, all before those that narrow, though each could be narrowed at once."""
    wide = [torch.mm(x, weight) for weight in weights]
    return torch.stack([torch.mm(each, weight.t()).sum() for each, weight in zip(wide, weights, strict=True)])


def test_inductors_kernels_run_in_the_chosen_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generated code says what was chosen, calls its kernels in that order, and computes the same."""
    asked: list[tuple[int, ...]] = []
    plain = orders.choose_order

    def reversed_order(problem: OrderProblem, given: tuple[int, ...]) -> orders.OrderAnswer:
        """Of the kernels that are ready always the last: legal, and surely not what Inductor does."""
        left, order = set(range(problem.count)), []
        while left:
            kernel = max(k for k in left if not set(problem.before[k]) & left)
            left.remove(kernel)
            order.append(kernel)
        answer = plain(problem, given)
        asked.append(tuple(order))
        return orders.OrderAnswer(tuple(order), peak_of(problem, order), answer.given, answer.bound, 1)

    monkeypatch.setattr("effcc.codegen.kernel_order.choose_order", reversed_order)
    x, weights = torch.rand(8, 16), [torch.rand(16, 32 + 16 * index) for index in range(3)]
    sources = []
    for mode in ("memory", "inductor"):
        torch._dynamo.reset()
        effcc.reset_reports()
        run = torch.compile(wide_then_narrow, backend="effcc", options={"kernel_order": mode, "gemm": "blas"})
        with torch._inductor.config.patch(fx_graph_cache=False):
            torch.testing.assert_close(run(x, weights), wide_then_narrow(x, weights))
        (region,) = effcc.reports()[-1].regions
        sources.append(region.source)
    assert len(asked) == 1
    ours, theirs = sources
    order = order_in(ours)
    assert order is not None and order.windows == 1 and order_in(theirs) is None
    pattern = re.compile(r"extern_kernels\.mm\((.*?), out")
    assert len(pattern.findall(ours)) == len(pattern.findall(theirs)) == 6
    sizes = [re.findall(r"\((\d+), (\d+)\)", call)[-1:] for call in pattern.findall(ours)]
    assert sizes != [re.findall(r"\((\d+), (\d+)\)", call)[-1:] for call in pattern.findall(theirs)] or (
        pattern.findall(ours) != pattern.findall(theirs)
    )
