"""Dropout and random ops: equal for equal seeds, other masks for each layer and call, the right distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Tower
from torch import nn
from torch.testing import assert_close
from towers import compile_plain, rows

pytestmark = pytest.mark.usefixtures("clean_compiler")

Compiler = Callable[..., Any]


# Random numbers


def test_same_seed_same_results(compiled: Compiler) -> None:
    model = Tower(dropout=0.5, width=16).double()
    run = compiled(model)
    x = rows(6, 16)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        result = run(x)
        result.sum().backward()
        results.append((result.detach(), model.layers[0].up.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x * self.scale, 0.5)


class ManyMasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Masks() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("marked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_layer_and_each_call_has_its_own_mask(marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal layers share code, not random numbers; the gradient has the forward's mask."""
    if marked:
        monkeypatch.setattr(Masks, "forward", torch.compiler.nested_compile_region(Masks.forward))
    run = compile_plain(ManyMasks())
    x = torch.ones(2000, dtype=torch.float64)
    masks = []
    for _ in range(2):
        y = x.clone().requires_grad_()
        results = run(y)
        masks += [result.detach() != 0 for result in results]
        weights = (1.0, 10.0, 100.0)
        sum((result * weight).sum() for result, weight in zip(results, weights, strict=True)).backward()
        wanted = sum(result.detach() * weight for result, weight in zip(results, weights, strict=True))
        assert_close(y.grad, wanted)
    for mask in masks:
        assert 0.45 < mask.double().mean().item() < 0.55
    for index, left in enumerate(masks):
        for right in masks[:index]:
            assert 0.4 < (left == right).double().mean().item() < 0.6


def test_random_ops_have_their_distribution() -> None:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            torch.rand_like(x),
            torch.randn_like(x),
            torch.bernoulli(x * 0 + 0.25),
            torch.randint_like(x, 0, 10),
            torch.empty_like(x).exponential_(2.0),
        )

    torch.manual_seed(5)
    uniform, normal, coin, dice, waiting = compile_plain(run)(torch.zeros(20000, dtype=torch.float64))
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean().item() - 0.5) < 0.02
    assert abs(normal.mean().item()) < 0.03 and abs(normal.std().item() - 1) < 0.03
    assert abs(coin.mean().item() - 0.25) < 0.02
    assert sorted(dice.unique().tolist()) == list(range(10))
    assert abs(waiting.mean().item() - 0.5) < 0.03
    assert abs(torch.corrcoef(torch.stack([uniform, waiting]))[0, 1].item()) < 0.05
