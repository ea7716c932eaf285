"""Under a memory budget cascades are fused for the memory that they save only where that is the cheapest way."""

from __future__ import annotations

from dataclasses import replace

import effcc
import pytest
import torch
from effcc import cascade_fusion, graph_compiler
from effcc.measuring import peak_of
from effcc.passes.raising.choose import Choice, Rates
from torch import nn
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("clean_compiler")

#: Kernels that are slow, so that a cascade is fused for its memory or not at all.
NEVER, ALWAYS = (Choice(Rates(fused=1e6), wide_bytes=1 << 12, memory_ratio=ratio) for ratio in (1e9, 0.0))


class Attending(nn.Module):
    """Two layers of attention, written out."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for into in self.into:
            query, key, value = into(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
            x = x + ((query @ key.mT / 3).softmax(-1) @ value).transpose(1, 2).flatten(2)
        return x.square().mean()


def compiled_step(model: Attending, x: torch.Tensor, budget: int | None) -> tuple[int, effcc.GraphReport]:
    """Bytes that a step holds at most, and the report of its backward; its gradients stay in the model."""
    torch._dynamo.reset()
    effcc.reset_reports()
    run = torch.compile(model, backend="effcc", options={} if budget is None else {"memory_budget": budget})

    def step() -> None:
        model.zero_grad(set_to_none=True)
        run(x).backward()

    step()
    model.zero_grad(set_to_none=True)
    peak = peak_of(step, torch.device("cpu")) + x.nbytes + sum(p.nbytes for p in model.parameters())
    return peak, effcc.reports()[-1]


def choosing(monkeypatch: pytest.MonkeyPatch, plain: Choice, short: Choice) -> None:
    for module in (graph_compiler, cascade_fusion):
        monkeypatch.setattr(module, "choice_for", lambda _, short_of_memory: short if short_of_memory else plain)
    monkeypatch.setattr(cascade_fusion, "for_memory", lambda choice: replace(choice, memory_ratio=short.memory_ratio))


@pytest.mark.slow
def test_cascades_are_fused_for_their_memory_where_it_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attending(), torch.randn(2, 300, 32)
    model(x).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    wide = 2 * 4 * 300 * 300 * 4

    choosing(monkeypatch, NEVER, ALWAYS)
    plain, report = compiled_step(model, x, None)
    assert not report.cascades and plain > 2 * wide
    _, report = compiled_step(model, x, 2 * plain)
    assert not report.cascades, "all fits as it is"
    peak, report = compiled_step(model, x, wide)
    assert report.cascades and peak <= wide, "without the scores in memory"
    for name, p in model.named_parameters():
        assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_way_that_is_predicted_to_be_faster_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attending(), torch.randn(2, 300, 32)
    choosing(monkeypatch, NEVER, ALWAYS)
    plain, _ = compiled_step(model, x, None)
    found, budget = {}, int(0.7 * plain)
    for name, (before, after) in {"both": (NEVER, ALWAYS), "written": (NEVER, NEVER), "fused": (ALWAYS,) * 2}.items():
        choosing(monkeypatch, before, after)
        peak, report = compiled_step(model, x, budget)
        assert peak <= budget and report.plan is not None
        found[name] = report.plan.seconds, bool(report.cascades)
    assert found["both"] == min(found["written"], found["fused"])
    assert not found["written"][1] and found["fused"][1]


def test_plans_made_offline_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attending(), torch.randn(2, 300, 32)
    wide = 2 * 4 * 300 * 300 * 4
    choosing(monkeypatch, NEVER, ALWAYS)
    plans = [effcc.plan(model, (x,), train=True, memory_budget=budget).plan for budget in (20 * wide, wide)]
    fused = [any("cascade" in step.name for step in plan.steps) for plan in plans]
    assert fused == [False, True]
    assert plans[1].peak["device"] <= wide
