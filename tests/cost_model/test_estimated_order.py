"""Plans for another machine: estimated kernels stand in the order that needs least memory, and name what they read."""

from __future__ import annotations

import effcc
import torch
from effcc.cost_model.step_bounds import needs
from torch import nn


class Wide(nn.Module):
    """Three wide values, each of which is read by a sum of few elements at once: best made one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(64, 4096, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = [part(x) for part in self.parts]
        sums = [each.t() @ each for each in wide]
        return torch.stack([each.diagonal().sum() for each in sums]).sum()


def test_wide_values_are_made_one_after_the_other() -> None:
    plan = effcc.plan(Wide(), (torch.randn(1024, 64),), device="h100").plan
    (order,) = [each for each in plan.decisions if each.kind == "kernel order"]
    ways = {each.what: each.value for each in order.alternatives}
    assert order.chosen == "least memory"
    assert ways["least memory"] < ways["as the ops stand"]
    assert order.bound is not None and order.bound <= ways["least memory"]


class Fan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.parts = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return torch.cat([part(y) for part in self.parts], -1)


def test_every_reader_of_a_value_waits_for_it() -> None:
    """Not the first and the last alone: those between would run beside what makes the value."""
    plan = effcc.plan(Fan(), (torch.randn(32, 64),), device="h100").plan
    products = [index for index, step in enumerate(plan.steps) if step.name == "mm"]
    assert len(products) == 5
    before = needs(plan.steps)
    assert all(products[0] in before[index] for index in products[1:])
