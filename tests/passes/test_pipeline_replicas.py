"""Replicas of a pipeline: when the sums of their gradients run, what they do to bounds and plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
from effcc.errors import ScheduleError
from effcc.ir.plan import Plan
from effcc.ir.plan_validator import problems
from effcc.passes.pipeline_parallel import classic, v_shape, vocabulary
from effcc.passes.pipeline_parallel.bounds import lower_bound
from effcc.passes.pipeline_parallel.costs import PipelineCosts, uniform_costs
from effcc.passes.pipeline_parallel.heuristics import Found
from effcc.passes.pipeline_parallel.optimal import solve
from effcc.passes.pipeline_parallel.plan import from_plan, replicas_of, to_plan
from effcc.passes.pipeline_parallel.precedence import Problem
from effcc.passes.pipeline_parallel.schedule import Schedule
from effcc.passes.pipeline_parallel.simulate import REPLICAS, simulate
from fresh_seed import fresh_random

SCHEDULES = {
    "1f1b": classic.one_forward_one_backward(3, 4),
    "zb-h1": classic.zero_bubble_h1(3, 4),
    "v-half": v_shape.v_half(2, 4),
    "one barrier": vocabulary.vocabulary_1f1b(3, 4, "one-barrier", embedding=True),
}


def test_sums_run_beside_later_passes() -> None:
    """Two stages, two microbatches, forward 1 and backward 2: stage 1 has its gradients at 7 and stage 0 at 9."""
    schedule = classic.one_forward_one_backward(2, 2)
    costs = uniform_costs(schedule)
    for sums, end in (((0.5, 1.0), 9.5), ((0.5, 3.0), 10.0), ((0.0, 2.0), 9.0)):
        run = simulate(schedule, replace(costs, gradient=sums))
        assert run.seconds == end
        assert run.compute == (6.0, 6.0)
        assert lower_bound(Problem(schedule, replace(costs, gradient=sums))) == end


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_bounds_hold(schedule: Schedule) -> None:
    draw = fresh_random()
    plain = uniform_costs(schedule, transfer=0.1, collective=0.1)
    costs = replace(
        plain,
        gradient=tuple(draw.choice([0.0, 0.3, 5.0]) * draw.random() for _ in range(schedule.stages)),
        shard_gradient=(draw.random(), draw.random()) if schedule.vocabulary else (0.0, 0.0),
    )
    problem = Problem(schedule, costs)
    solved = solve(problem, [schedule], time_limit=0.5)
    assert lower_bound(Problem(schedule, plain)) <= lower_bound(problem) <= solved.found.bound + 1e-9
    assert solved.found.bound <= solved.found.run.seconds + 1e-9
    assert solved.found.run.seconds <= simulate(schedule, costs).seconds + 1e-9


def _plan(schedule: Schedule, costs: PipelineCosts, replicas: int) -> Plan:
    run = simulate(schedule, costs)
    return to_plan(Found(schedule, run, 0.0), model="m", device="a100-80g", replicas=replicas)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_plans_have_the_steps_of_all_replicas(schedule: Schedule) -> None:
    costs = replace(
        uniform_costs(schedule), gradient=(0.5,) * schedule.stages,
        shard_gradient=(0.5, 0.25) if schedule.vocabulary else (0.0, 0.0),
    )  # fmt: skip
    plan = _plan(schedule, costs, 3)
    assert problems(plan) == []
    assert from_plan(plan) == schedule and replicas_of(plan) == 3
    single = _plan(schedule, costs, 1)
    assert len(plan.steps) == 3 * len(single.steps) and plan.seconds == single.seconds
    sums = [step for step in plan.steps if step.stream == REPLICAS]
    for meeting in {step.rendezvous for step in sums}:
        devices = sorted(step.device for step in sums if step.rendezvous == meeting)
        assert devices == list(range(devices[0], devices[0] + 3)) and devices[0] % 3 == 0
    # What one replica's ranks do together, the others' do by themselves.
    inside = {step.rendezvous for step in plan.steps if step.rendezvous and step.stream != REPLICAS}
    assert all(len({step.device % 3 for step in plan.steps if step.rendezvous == name}) == 1 for name in inside)


def test_replicas_that_differ() -> None:
    import msgspec

    schedule = SCHEDULES["1f1b"]
    plan = _plan(schedule, uniform_costs(schedule), 2)
    found = next(index for index, step in enumerate(plan.steps) if step.device == 1 and step.name == "0F1")
    other = msgspec.structs.replace(plan.steps[found], name="0F2")
    plan = msgspec.structs.replace(plan, steps=(*plan.steps[:found], other, *plan.steps[found + 1 :]))
    with pytest.raises(ScheduleError, match="replicas"):
        from_plan(plan)
