"""Expert placement: brute-force optima of tiny cases, published results, proven bounds, the independent validator."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from effcc.cost_model.expert_placement import columns
from effcc.cost_model.expert_placement.balance import balance_layer, busiest_load, least_load
from effcc.cost_model.expert_placement.baselines import eplb_global, eplb_hierarchical, round_robin
from effcc.cost_model.expert_placement.bounds import kept_by_rows
from effcc.cost_model.expert_placement.online import LoadEstimate, Replanner, choose
from effcc.cost_model.expert_placement.problem import Problem, Weights, costs
from effcc.cost_model.expert_placement.routing import Routing, count, from_choices
from effcc.cost_model.expert_placement.semidefinite import Semidefinite
from effcc.cost_model.expert_placement.solver import solve
from effcc.errors import PlacementError
from effcc.ir.placement_validator import validate_placement
from expert_routing import planted, preferred, walk
from fresh_seed import fresh_random
from some_by_default import some_by_default

#: The example of EPLB's README: 12 experts in 4 groups, 16 slots on 8 devices of 2 nodes.
EPLB = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    np.float64,
)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(fresh_random().getrandbits(32))


def routing(generator: np.random.Generator, experts: int, layers: int, tokens: int, k: int = 1) -> Routing:
    first, steps = preferred(generator, experts, layers, 0.4)
    return count(from_choices(walk(generator, first, steps, tokens, k), experts))


def optimum(problem: Problem) -> float:
    """The least objective, by trying all placements. For a few experts and layers."""
    rows = set()
    spare = problem.slots - problem.experts
    for more in itertools.combinations_with_replacement(range(problem.experts), spare):
        for order in itertools.permutations([*range(problem.experts), *more]):
            by_rank = [sorted(order[at : at + problem.per_rank]) for at in range(0, problem.slots, problem.per_rank)]
            rows.add(tuple(itertools.chain.from_iterable(by_rank)))
    options = [np.array(row, np.int64) for row in sorted(rows)]
    return min(
        costs(problem, np.stack(chosen)).objective(problem.weights)
        for chosen in itertools.product(options, repeat=problem.layers)
    )


def facts(problem: Problem, result: object) -> dict[str, object]:
    from effcc.cli_place_experts import _facts

    return _facts(problem, result)


def check(problem: Problem, result: object) -> None:
    validate_placement(
        facts(problem, result), problem.loads.tolist(), problem.transitions.tolist(), problem.ranks, problem.nodes,
        problem.groups if problem.grouped else 0, None if problem.current is None else problem.current.tolist(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("experts", "ranks", "slots", "nodes", "layers"),
    some_by_default(
        [(4, 2, 4, 1, 3), (4, 4, 4, 2, 2), (3, 2, 4, 1, 2), (6, 3, 6, 1, 2)],
        {(4, 2, 4, 1, 3)},
    ),
)
def test_optimum_of_tiny_cases(
    generator: np.random.Generator, experts: int, ranks: int, slots: int, nodes: int, layers: int
) -> None:
    found = routing(generator, experts, layers, 60)
    weights = Weights(float(generator.integers(0, 3)), float(generator.integers(0, 2)), float(generator.integers(1, 5)))
    problem = Problem(found.loads, found.transitions, ranks, nodes, slots, weights=weights)
    best = optimum(problem)
    result = solve(problem, time_limit=0.6)
    check(problem, result)
    assert result.bound <= best * (1 + 1e-9) + 1e-9
    assert result.objective == pytest.approx(best)


def test_migration_is_weighed(generator: np.random.Generator) -> None:
    found = routing(generator, 4, 2, 60)
    current = np.stack([generator.permutation(4) for _ in range(2)]).astype(np.int64)
    for migration in (0.0, 7.0, 1e6):
        problem = Problem(found.loads, found.transitions, 2, current=current, weights=Weights(1.0, 1.0, 1.0, migration))
        result = solve(problem, time_limit=1.0)
        check(problem, result)
        assert result.objective == pytest.approx(optimum(problem))
    assert result.costs.migrated == 0


def test_published_example_of_eplb() -> None:
    """EPLB's own greedy gives 1.2081, 1.2422 (hierarchical) and 1.0726, 1.1903; the optimum is lower."""
    none = np.zeros((1, 12, 12))
    alone = Weights(0.0, 0.0, 1.0)
    for grouped, greedy, theirs, ours in (
        (True, eplb_hierarchical, [1.2081, 1.2422], [1.1694, 1.2422]),
        (False, eplb_global, [1.0726, 1.1903], [1.0533, 1.1903]),
    ):
        problem = Problem(EPLB, none, 8, 2, 16, 4, grouped, weights=alone)
        assert costs(problem, greedy(problem)).max_over_mean.round(4).tolist() == theirs
        result = solve(problem, time_limit=60)
        check(problem, result)
        assert result.costs.max_over_mean.tolist() == pytest.approx(ours, abs=1e-4)
        assert result.status == "optimal"


@pytest.mark.parametrize("slots", [6, 8])
def test_balance_of_a_layer_is_optimal(generator: np.random.Generator, slots: int) -> None:
    load = generator.integers(0, 50, (1, 6)).astype(np.float64)
    problem = Problem(load, np.zeros((0, 6, 6)), 2, slots=slots, weights=Weights(0.0, 0.0, 1.0))
    best = optimum(problem)
    found = balance_layer(problem, 0, eplb_global(problem)[0], np.inf)
    assert found.busiest == pytest.approx(best) == pytest.approx(busiest_load(problem, load[0], found.slots))
    assert least_load(load[0], slots, 2) <= best * (1 + 1e-12)


def test_bounds_hold_for_random_placements(generator: np.random.Generator) -> None:
    """Whatever the multipliers: after each round no random placement keeps more than the bound says."""
    found = routing(generator, 8, 4, 400, 2)
    problem = Problem(found.loads, found.transitions, 4, 2)
    total = found.transitions.sum()
    relaxation = Semidefinite(found.transitions, 4)
    bound = kept_by_rows(problem, 4)
    for _ in range(5):
        bound = min(bound, relaxation.run(int(generator.integers(1, 12)), np.inf), relaxation.evaluate())
    best = solve(replace(problem, nodes=1, weights=Weights(1.0, 0.0, 0.0)), time_limit=3.0)
    assert total - best.costs.device <= bound * (1 + 1e-9)
    assert bound < kept_by_rows(problem, 4)  # it is better than the simple one
    copies = Problem(found.loads, found.transitions, 4, slots=12)
    for _ in range(50):
        row = [generator.permutation(np.append(np.arange(8), generator.integers(0, 8, 4))) for _ in range(4)]
        kept = total - costs(copies, np.stack(row)).device
        assert kept <= kept_by_rows(copies, 4)


def test_columns_settle_what_annealing_starts(generator: np.random.Generator) -> None:
    """8 experts on 4 devices, four layers: proven, and never above any of many random restarts."""
    found = routing(generator, 8, 4, 500)
    problem = Problem(found.loads, found.transitions, 4, weights=Weights(1.0, 0.0, float(generator.integers(0, 3))))
    assert columns.fits(problem)
    result = solve(problem, time_limit=30)
    check(problem, result)
    assert result.status == "optimal"
    for seed in range(5):
        other = solve(problem, time_limit=0.2, seed=seed)
        assert result.objective <= other.objective


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_sixteen_experts_are_proven_optimal(generator: np.random.Generator, k: int) -> None:
    first, steps, _ = planted(generator, 16, 4, 4, float(generator.uniform(0.3, 0.8)))
    found = count(from_choices(walk(generator, first, steps, 5000, k), 16))
    problem = Problem(found.loads, found.transitions, 4)
    result = solve(problem, time_limit=120)
    check(problem, result)
    assert result.status == "optimal"


def test_planted_groups_are_found(generator: np.random.Generator) -> None:
    first, steps, group = planted(generator, 32, 6, 4, 0.7)
    found = count(from_choices(walk(generator, first, steps, 4000), 32))
    problem = Problem(found.loads, found.transitions, 4, weights=Weights(1.0, 0.0, 0.0))
    result = solve(problem, time_limit=4)
    check(problem, result)
    known = costs(problem, np.argsort(group, axis=1, kind="stable"))
    assert result.costs.device <= known.device
    assert result.gap <= 0.05
    assert result.costs.device < 0.6 * costs(problem, round_robin(problem)).device


def test_groups_stay_on_nodes(generator: np.random.Generator) -> None:
    found = routing(generator, 8, 3, 300)
    problem = Problem(found.loads, found.transitions, 4, 2, 12, 4, True, weights=Weights(1.0, 1.0, 1.0))
    result = solve(problem, time_limit=0.8)
    check(problem, result)
    greedy = costs(problem, eplb_hierarchical(problem)).objective(problem.weights)
    assert result.objective <= greedy


def test_counting_is_exact(generator: np.random.Generator) -> None:
    """Loads and transitions beside a count by hand; rows in any order; tokens that miss layers."""
    choices = generator.integers(0, 5, (40, 3, 2))
    trace = from_choices(choices)
    kept = generator.permutation(trace.token.size)[: trace.token.size * 3 // 4]
    part = type(trace)(*(getattr(trace, name)[kept] for name in ("token", "layer", "slot", "expert")))
    found = count(part, 5)
    loads, transitions = np.zeros((3, 5)), np.zeros((2, 5, 5))
    rows = list(zip(part.token, part.layer, part.slot, part.expert, strict=True))
    for token, layer, _, expert in rows:
        loads[layer, expert] += 1
        for other_token, other_layer, _, other in rows:
            if other_token == token and other_layer == layer + 1:
                transitions[layer, expert, other] += 1
    assert (found.loads == loads).all() and (found.transitions == transitions).all()
    assert found.tokens == len(set(part.token.tolist()))


def test_replanning_follows_a_drift(generator: np.random.Generator) -> None:
    """A step changes only what pays, and after a drift the placement is as good as one made anew, within a tenth."""
    before, after = (routing(generator, 16, 3, 600) for _ in range(2))
    problem = Problem(before.loads, before.transitions, 4, weights=Weights(1.0, 0.0, 1.0, 5.0))
    start = solve(problem, time_limit=1)
    replanner = Replanner(replace(problem, current=start.slots), window=2, hysteresis=0.02)
    assert (replanner.step(before.loads, before.transitions).slots == start.slots).all()
    for _ in range(3):
        replanner.step(after.loads, after.transitions)
    now = Problem(2 * after.loads, 2 * after.transitions, 4, weights=Weights(1.0, 0.0, 1.0))
    reached = costs(now, replanner.slots).objective(now.weights)
    assert reached <= 1.1 * solve(now, time_limit=1).objective
    assert (replanner.estimate.loads == 2 * after.loads).all()


def test_window_forgets_exactly() -> None:
    estimate = LoadEstimate(2, 3, window=2)
    for value in range(5):
        estimate.add(np.full((2, 3), float(value)), np.full((1, 3, 3), float(value)))
    assert (estimate.loads == 7).all() and (estimate.transitions == 7).all()


def test_hysteresis_keeps_what_is_good_enough(generator: np.random.Generator) -> None:
    found = routing(generator, 8, 3, 300)
    good = solve(Problem(found.loads, found.transitions, 4), time_limit=1)
    current = good.slots.copy()
    current[0, [0, 2]] = current[0, [2, 0]]
    problem = Problem(found.loads, found.transitions, 4, current=current)
    assert (choose(problem, 0.5, time_limit=1).slots == current).all()
    assert choose(problem, 0.0, time_limit=1).objective <= costs(problem, current).objective(problem.weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": 3}, "do not divide among 3 ranks"),
        ({"slots": 6}, "cannot hold"),
        ({"nodes": 3}, "among 3 nodes"),
        ({"groups": 3}, "into 3 groups"),
        ({"groups": 1, "nodes": 2, "grouped": True}, "1 groups do not divide"),
        ({"current": np.zeros((1, 8), np.int64)}, "current placement has 1 layers"),
    ],
)
def test_numbers_that_do_not_fit(change: dict[str, object], said: str) -> None:
    base: dict[str, object] = {"loads": np.ones((2, 8)), "transitions": np.ones((1, 8, 8)), "ranks": 2}
    with pytest.raises(PlacementError, match=said):
        Problem(**(base | change))  # type: ignore[arg-type]


def test_validator_finds_faults(generator: np.random.Generator) -> None:
    from effcc.errors import PlanError

    found = routing(generator, 4, 2, 50)
    problem = Problem(found.loads, found.transitions, 2)
    good = facts(problem, solve(problem, time_limit=0.5))
    for key, value in (("objective", -1.0), ("migrated", 3), ("hops", {"device": 1e9, "node": 0}), ("gap", 0.5)):
        with pytest.raises(PlanError):
            validate_placement(good | {key: value}, found.loads.tolist(), found.transitions.tolist(), 2)
    layers = [dict(layer) for layer in good["layers"]]
    layers[0]["slots"] = [0, 0, 1, 2]
    with pytest.raises(PlanError, match="without a slot"):
        validate_placement(good | {"layers": layers}, found.loads.tolist(), found.transitions.tolist(), 2)
