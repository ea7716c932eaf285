"""``measure_candidates``: what the model cannot tell apart is run, the faster is kept and remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import effcc
import pytest
import torch
from effcc import candidate_timing
from some_by_default import some_by_default
from torch import nn


class Attention(nn.Module):
    """Written out, with scores that are wide enough to be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(32, 3 * 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x).chunk(3, -1)
        return torch.softmax(q @ k.transpose(-1, -2) / 32**0.5, -1) @ v


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def run(seed: int = 0, remember: bool = False) -> tuple[torch.Tensor, Any, torch.Tensor]:
        torch._dynamo.reset()
        effcc.reset_reports()
        torch.manual_seed(seed)
        model, x = Attention(), torch.randn(4, 700, 32)
        options: dict[str, Any] = {"measure_candidates": True}
        if remember:  # else with the code that other tests have compiled
            options["cache_dir"] = str(tmp_path)
        compiled = torch.compile(model, backend="effcc", options=options)
        made = compiled(x)
        made.sum().backward()
        torch.testing.assert_close(made, model(x), rtol=1e-4, atol=1e-5)
        assert model.heads.weight.grad is not None
        return made, effcc.reports(), model.heads.weight.grad

    return run


def fusion_of(reports: Any) -> Any:
    (found,) = [each for each in reports[-1].plan.decisions if each.kind == "candidates"]
    return found


@pytest.mark.slow
def test_a_tie_is_measured_once_and_remembered(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidate_timing, "APART", 1e9)
    asked: list[dict[str, float]] = []
    plain = candidate_timing._measured

    def measured(made: Any, gm: Any) -> dict[str, float]:
        asked.append(plain(made, gm))
        return asked[-1]

    monkeypatch.setattr(candidate_timing, "_measured", measured)
    _, reports, _ = run(remember=True)
    (seconds,) = asked
    assert set(seconds) == {"fused", "as written"} and all(value > 0 for value in seconds.values())
    decision = fusion_of(reports)
    assert decision.chosen == min(seconds, key=seconds.__getitem__)
    assert {each.what: each.value for each in decision.alternatives} == seconds
    assert all(each.measured for each in decision.alternatives)
    assert len(list(tmp_path.glob("candidates-*.json"))) == 1
    _, again, _ = run(remember=True)
    assert len(asked) == 1 and fusion_of(again).alternatives == decision.alternatives


@pytest.mark.parametrize("faster", some_by_default(["fused", "as written"], {"fused"}))
def test_the_faster_one_runs(run: Any, monkeypatch: pytest.MonkeyPatch, faster: str) -> None:
    monkeypatch.setattr(candidate_timing, "APART", 1e9)
    monkeypatch.setattr(candidate_timing, "_known", lambda *_: None)
    monkeypatch.setattr(candidate_timing, "_remember", lambda *_: None)
    monkeypatch.setattr(
        candidate_timing, "_measured", lambda made, gm: {name: 1.0 if name == faster else 2.0 for name in made}
    )
    _, reports, _ = run()
    assert fusion_of(reports).chosen == faster
    assert [report.phase for report in reports] == ["forward", "backward"]
    assert all(report.started for report in reports)
    assert any(report.cascades for report in reports) == (faster == "fused")


def test_what_the_model_tells_apart_is_not_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidate_timing, "APART", 1.0)
    monkeypatch.setattr(candidate_timing, "_measured", lambda *_: pytest.fail("it was run"))
    _, reports, _ = run()
    decision = fusion_of(reports)
    assert not any(each.measured for each in decision.alternatives)
    assert decision.chosen == min(decision.alternatives, key=lambda each: each.value).what
