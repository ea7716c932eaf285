"""The relaxation behind the bounds on hops and loads: its inequalities and its bound hold for every placement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from effcc.cost_model.expert_placement.bounds import Bounds
from effcc.cost_model.expert_placement.problem import Problem, Weights, costs
from effcc.cost_model.expert_placement.routing import count, from_choices
from effcc.cost_model.expert_placement.semidefinite import Semidefinite
from effcc.cost_model.expert_placement.stars import Stars
from expert_routing import preferred, walk
from fresh_seed import fresh_random


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(fresh_random().getrandbits(32))


def test_stars_hold_for_partitions_and_cut_off_halves(generator: np.random.Generator) -> None:
    """An expert that is half with each of three others which are apart: every triangle holds, its star does not."""
    half = np.eye(6)
    half[0, 1:4] = half[1:4, 0] = 0.5
    noise = np.clip(generator.normal(0.3, 0.3, (6, 6)), 0, 1)
    stars = Stars(2, 6)
    assert stars.separate(np.stack([half, np.maximum(np.triu(noise), np.triu(noise).T)])) >= 1
    assert stars.separate(np.zeros((2, 6, 6))) == 0 and stars.price.size == 0  # none had a price
    assert stars.separate(np.stack([half, half])) == 2
    stars.ascend(np.stack([half, half]), 1.0)
    assert stars.price.tolist() == [0.5, 0.5]
    assert stars.cost()[0, 0, 1] == stars.cost()[0, 2, 0] == 0.5 and stars.cost()[0, 1, 2] == -0.5
    assert stars.separate(np.stack([half, half])) == 0  # they are known
    for _ in range(20):
        group = generator.integers(0, 3, 6)
        whole = np.repeat((group[:, None] == group[None, :])[None].astype(float), 2, axis=0)
        before = stars.price.copy()
        stars.ascend(whole, 0.1)
        assert (stars.price <= before).all()
        stars.price = before


def test_bound_of_kept_tokens_and_loads_together(generator: np.random.Generator) -> None:
    """Beside the best of all placements of six experts in three groups, in three layers; on both sides of the rounds at
    which inequalities come in."""
    first, steps = preferred(generator, 6, 3, 0.3)
    routing = count(from_choices(walk(generator, first, steps, 200), 6))
    weight = float(generator.choice([0.0, 0.5, 2.0]))
    rows = sorted({tuple(order) for order in itertools.permutations([0, 0, 1, 1, 2, 2])})
    device = np.array(rows)
    with_ = (device[:, :, None] == np.arange(3)).astype(float)  # [rows, experts, groups]
    busiest = np.einsum("reg,le->rlg", with_, routing.loads).max(axis=2)
    kept = [np.einsum("aig,ij,bjg->ab", with_, counts, with_) for counts in routing.transitions]
    total = kept[0][:, :, None] + kept[1][None, :, :]
    cost = busiest[:, None, None, 0] + busiest[None, :, None, 1] + busiest[None, None, :, 2]
    best = float((total - weight * cost).max())
    relaxation = Semidefinite(routing.transitions, 3, None, weight * routing.loads)
    for rounds in (1, 9, 60, 90):
        assert relaxation.run(rounds, np.inf) >= best * (1 - 1e-9) - 1e-9
    # Three groups of two: nearly tight in so few experts, beside all tokens and the loads that even groups would have.
    scale = float(routing.transitions.sum() + weight * routing.loads.sum() / 3)
    assert relaxation.bound - best < 0.2 * scale


def test_bounds_that_count_loads_too(generator: np.random.Generator) -> None:
    """Both together are never worse than the row sums and means that all begin with, and hold for random placements."""
    first, steps = preferred(generator, 12, 4, 0.2)
    routing = count(from_choices(walk(generator, first, steps, 500), 12))
    problem = Problem(routing.loads, routing.transitions, 4, weights=Weights(1.0, 1.0, 4.0))
    bounds = Bounds(problem)
    before = bounds.objective
    start = np.stack([generator.permutation(12) for _ in range(4)])
    known = costs(problem, start).objective(problem.weights)
    bounds.relax(start, known, np.inf)
    assert bounds.objective >= before
    for _ in range(200):
        slots = np.stack([generator.permutation(12) for _ in range(4)])
        assert costs(problem, slots).objective(problem.weights) >= bounds.objective - 1e-6
