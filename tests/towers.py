"""Towers of equal layers, compiled and in eager: what the tests of training code share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import effcc
import torch
from models import Tower
from torch import nn
from torch.testing import assert_close


def compile_plain(model: Any, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    return torch.compile(model, backend="effcc", options=options or {}, **settings)


def unfused_step(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> Callable[[], torch.Tensor]:
    """A training step compiled anew with these options, without cascades."""
    torch._dynamo.reset()
    effcc.reset_reports()
    compiled = compile_plain(model, {"cascades": False, **options})

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = compiled(**inputs).square().mean()
        loss.backward()
        return loss.detach()

    return step


def pair(**sizes: Any) -> tuple[Tower, Tower]:
    """Two equal towers in float64: one for eager, one to compile."""
    tower = Tower(**sizes).double()
    return tower, copy.deepcopy(tower)


def rows(count: int = 5, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64)


def assert_equal_gradients(found: nn.Module, wanted: nn.Module) -> None:
    for (name, left), right in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def assert_no_fallbacks() -> None:
    assert effcc.reports() and [item for report in effcc.reports() for item in report.fallbacks] == []
