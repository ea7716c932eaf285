"""Budgets in offline plans: kept on any device, priced, with a floor near a bound; time against memory."""

from __future__ import annotations

import functools

import effcc
import pytest
import torch
from effcc.errors import BudgetError
from effcc.formatting import bytes_text
from effcc.ir.plan_validator import problems
from effcc.passes.activation.host_link import HostLink
from effcc.plan_request import PlanRequest
from effcc.planning import Planned, plan_model
from effcc.summary import live_use
from models import Tower

INPUTS = (torch.ones(512, 32),)


def planned(device: str, budget: int | None) -> Planned:
    return effcc.plan(
        Tower(width=32, depth=4), INPUTS, train=True, optimizer="adamw", device=device, memory_budget=budget
    )


@functools.cache
def plain_peak(device: str) -> int:
    """Peak of keeping all, in the count that budgets go by."""
    return planned(device, 1 << 40).plan.peak["device"]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "h200"])
def test_budgets_are_kept_and_cost_more_the_smaller_they_are(device: str) -> None:
    plain = plain_peak(device)
    found = [planned(device, int(plain * share)) for share in (1.0, 0.85, 0.7)]
    for share, each in zip((1.0, 0.85, 0.7), found, strict=True):
        assert problems(each.plan) == []
        assert each.plan.peak["device"] <= int(plain * share)
        assert each.plan.budget == int(plain * share)
    times = [each.activations[0].seconds for each in found]
    assert times == sorted(times)
    assert found[0].activations[0].rule == "keep"
    choice = found[-1].activations[0]
    assert choice.rule == "planned" and choice.gap is not None and choice.gap <= 0.05
    assert any(row.fate == "recompute" and row.bytes > 0 for row in choice.rows)
    assert any(step.kind == "recompute" for step in found[-1].plan.steps)
    assert any(note.startswith("Activations: ") for note in found[-1].plan.notes)
    (solver,) = [s for s in found[-1].plan.solvers if s.problem.startswith("activations")]
    assert 0 < solver.bound <= solver.value


@pytest.mark.slow
def test_an_impossible_budget_names_a_floor_that_works() -> None:
    with pytest.raises(BudgetError) as caught:
        planned("h200", 1 << 16)
    text = str(caught.value)
    floor = int(text.split("The least budget that works is ")[1].split()[0])
    assert "No choice of what is kept gets below" in text
    assert planned("h200", floor).plan.peak["device"] <= floor


@pytest.mark.slow
def test_where_the_optimizer_needs_most_its_step_is_the_least() -> None:
    # Keeping all needs more than the optimizer's step, and the smallest choice needs less.
    def planned_wide(budget: int) -> Planned:
        model, given = Tower(width=128, depth=4), (torch.ones(256, 128),)
        return effcc.plan(model, given, train=True, optimizer="adamw", device="h200", memory_budget=budget)

    plain = planned_wide(1 << 40).plan
    step = [step.id for step in plain.steps if step.phase == "optimizer"]
    use = live_use(plain)[step[0]]
    assert use < plain.peak["device"]
    with pytest.raises(BudgetError, match="the optimizer's step needs") as caught:
        planned_wide(use // 2)
    floor = int(str(caught.value).split("The least budget that works is ")[1].split()[0])
    assert floor == use
    assert f"gets below {bytes_text(use)}" in str(caught.value)
    assert planned_wide(floor).plan.peak["device"] == floor


@pytest.mark.slow
def test_time_against_memory_falls() -> None:
    request = PlanRequest(model="Tower", train=True, device="h200", pareto=True)
    from effcc.plan_capture import spec_of_module

    found = plan_model(request, spec=spec_of_module(Tower(width=32, depth=4), INPUTS, None)).pareto
    assert len(found) >= 3
    peaks = [point.peak for point in found]
    assert peaks == sorted(peaks, reverse=True)
    assert all(point.bound <= point.seconds * (1 + 1e-9) for point in found)
    times = [point.seconds for point in found]
    assert times == sorted(times)


def test_auto_is_the_memory_of_the_device() -> None:
    from effcc.cost_model.devices import load_device

    found = effcc.plan(Tower(), (torch.ones(2, 8),), train=True, device="h200", memory_budget="auto")
    assert found.plan.budget == load_device("h200").memory


@pytest.mark.slow
def test_swapped_values_are_copies_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from effcc import budget_planning

    # As if the link were fast: recomputation would be chosen otherwise for tensors this small.
    fast = HostLink(out=1e15, back=1e15, latency=1e-12, capacity=1 << 50, overlapped=True)
    monkeypatch.setattr(budget_planning, "host_link", lambda device: fast)
    budget = int(0.8 * plain_peak("h200"))
    request = PlanRequest(model="Tower", train=True, optimizer="adamw", device="h200", memory_budget=budget, swap=True)
    from effcc.plan_capture import spec_of_module

    found = plan_model(request, spec=spec_of_module(Tower(width=32, depth=4), INPUTS, None))
    assert found.plan.peak["device"] <= budget and problems(found.plan) == []
    out = [step for step in found.plan.steps if step.kind == "swap_out"]
    back = [step for step in found.plan.steps if step.kind == "swap_in"]
    assert len(out) == len(back) > 0
    assert {step.stream for step in out} == {"copy out"} and {step.stream for step in back} == {"copy in"}
    assert {step.phase for step in out} == {"forward"} and {step.phase for step in back} == {"backward"}
    ends = {step.id: step.start + step.seconds for step in found.plan.steps}
    for step in found.plan.steps:
        assert all(ends[other] <= step.start + 1e-12 for other in step.depends)
    assert found.activations[0].swapped_bytes > 0
