"""Orders by moves around the peak: legal, never worse, the best of small graphs most often, and layer after layer."""

from __future__ import annotations

import itertools
import random

import pytest
from effcc.cost_model.kernel_order import OrderProblem, Value, choose_order, lower_bound, peak_of, use_over
from effcc.cost_model.order_moves import moved_around_peak
from fresh_seed import fresh_random
from kernel_orders import legal


def random_problem(rng: random.Random, count: int) -> OrderProblem:
    """Each kernel makes a value, reads some of those before it, and may write over one of its size."""
    made: list[tuple[int, int, list[int], list[int]]] = [(rng.randint(1, 3), -1, [], []) for _ in range(2)]
    before: list[tuple[int, ...]] = []
    for kernel in range(count):
        read = rng.sample(range(len(made)), min(len(made), rng.randint(1, 3)))
        for each in read:
            made[each][2].append(kernel)
        before.append(tuple(sorted({made[each][1] for each in read if made[each][1] >= 0})))
        size = rng.randint(1, 3)
        made.append((size, kernel, [], [each for each in read if made[each][0] == size]))
    values = tuple(Value(size, maker, tuple(used), not used, tuple(over)) for size, maker, used, over in made)
    return OrderProblem(count, tuple(before), values)


def every_order(problem: OrderProblem) -> list[tuple[int, ...]]:
    return [order for order in itertools.permutations(range(problem.count)) if legal(problem, order)]


def test_what_is_written_over_is_counted_once() -> None:
    # x (4, given) is read by a and b; b, which comes last, writes its result over x; c cannot: x is gone.
    values = (Value(4, -1, (0, 1)), Value(2, 0, (2,)), Value(4, 1, (2,), over=(0,)), Value(4, 2, (), True, (0, 2)))
    problem = OrderProblem(3, ((), (), (0, 1)), values)
    assert use_over(problem, (0, 1, 2)) == [4 + 2, 4 + 2, 4 + 2]
    assert use_over(problem, (1, 0, 2)) == [4 + 4, 4 + 4 + 2, 4 + 2]
    assert lower_bound(problem) <= 6


def test_small_graphs_get_near_the_best_of_all_orders() -> None:
    rng = fresh_random()
    improved = reached = total = 0
    for _ in range(60):
        problem = random_problem(rng, rng.randint(4, 7))
        every = every_order(problem)
        best = min(peak_of(problem, order) for order in every)
        worst = max(every, key=lambda order: peak_of(problem, order))
        order, peak = moved_around_peak(problem, worst)
        assert sorted(order) == list(range(problem.count)) and legal(problem, order)
        assert lower_bound(problem) <= best <= peak == peak_of(problem, order) <= peak_of(problem, worst)
        assert (order, peak) == moved_around_peak(problem, worst), "again the same"
        improved += peak < peak_of(problem, worst)
        reached += peak == best
        total += 1
    assert improved and reached >= 0.8 * total, f"{reached} of {total}"


@pytest.mark.parametrize("layers", [3, 30])
def test_every_layer_is_looked_at(layers: int) -> None:
    """Each layer makes a large value in its course and another beside. Those beside are all made before any is read:
    moves bring their readers to their makers, in a graph too long for one window."""
    before: list[tuple[int, ...]] = []
    values: list[Value] = []
    for layer in range(layers):
        first = 4 * layer
        before += [(first - 1,) if layer else (), (first,), (first,), (first + 1, first + 2)]
        values += [Value(10, first, (first + 1, first + 2)), Value(1, first + 1, (first + 3,))]
        values += [
            Value(1, first + 2, (first + 3,)),
            Value(1, first + 3, (first + 4,) if layer < layers - 1 else (), True),
        ]
    # What runs between ...
    side = 4 * layers
    for layer in range(layers):
        before += [(4 * layer + 3,), (side + 2 * layer,)]
        values += [Value(10, side + 2 * layer, (side + 2 * layer + 1,)), Value(1, side + 2 * layer + 1, (), True)]
    problem = OrderProblem(len(before), tuple(before), tuple(values))
    # ... is begun for all layers, then ended.
    given = [*range(4 * layers), *range(side, side + 2 * layers, 2), *range(side + 1, side + 2 * layers, 2)]
    assert legal(problem, given) and peak_of(problem, given) >= 10 * layers
    order, peak = moved_around_peak(problem, given)
    assert legal(problem, order)
    assert peak <= 10 + 3 * layers + 2
    assert choose_order(problem, order).peak <= peak
