"""The example that trains a mixture of experts: it learns its language, and its routing is worth placing."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effcc.cost_model.expert_placement.baselines import eplb_global, round_robin
from effcc.cost_model.expert_placement.exflow import exflow
from effcc.cost_model.expert_placement.problem import Ints, Problem, Weights, costs
from effcc.cost_model.expert_placement.routing import Trace, count
from effcc.cost_model.expert_placement.solver import solve
from effcc.frontend.expert_trace import record_routing

EXAMPLE = Path(__file__).parent.parent / "examples" / "trained_moe.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("trained_moe", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_learns_and_its_routing_is_worth_placing() -> None:
    module = example()
    model = module.model()
    words, surprise = module.LANGUAGE.text(64, torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits = model(input_ids=words).logits[:, :-1]
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten()))
    assert surprise - 0.1 < loss < surprise + 0.25, (loss, surprise)
    assert loss < 0.5 * float(np.log(module.CONFIG.vocab_size))

    recorded = record_routing(model, (((), module.example_inputs()) for _ in range(8)))
    trace = Trace(recorded.token, recorded.layer, recorded.slot, recorded.expert, recorded.expert_count)
    routing = count(trace)
    problem = Problem(routing.loads, routing.transitions, 4)

    def point(slots: Ints) -> tuple[float, float]:
        found = costs(problem, slots)
        return float(found.device), float(found.busiest.sum())

    ours = [
        point(solve(replace(problem, weights=Weights(load=load)), time_limit=5.0).slots)
        for load in (0.0, 0.25, 1.0, 4.0, 16.0)
    ]
    ours.append(point(solve(replace(problem, weights=Weights(0.0, 0.0, 1.0)), time_limit=5.0).slots))
    for theirs in (round_robin(problem), eplb_global(problem)):
        hops, load = point(theirs)
        assert any(a <= hops and b <= load for a, b in ours), (ours, hops, load)
    assert ours[0][0] <= point(exflow(problem, 10.0))[0]
    # Routing that has learned something: far fewer changes than experts placed by their number make.
    assert min(hops for hops, _ in ours) < 0.8 * point(round_robin(problem))[0]
