"""Attention written out in plain PyTorch becomes fused kernels, in training, too."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effcc
import pytest
import torch
import torch.nn.functional as F
from effcc import graph_compiler
from effcc.passes.raising.choose import Choice, Rates
from effcc.torch_internals import peak_growth
from fresh_seed import fresh_random
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("clean_compiler")

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def vanilla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores(q, k), -1) @ v


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = scores(q, k)
    keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    return torch.softmax(s.masked_fill(~keep, float("-inf")), -1) @ v


def softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(20 * torch.tanh(scores(q, k) / 20), -1) @ v


def alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = scores(q, k)
    rows, columns = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])[None, :]
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1, dtype=q.dtype)
    return torch.softmax(s - slopes[:, None, None] * (rows - columns).abs(), -1) @ v


@pytest.fixture
def case(request: pytest.FixtureRequest) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values whose scores are far larger than they are; lengths that no tile divides."""
    generator = fresh_random()
    length = generator.randrange(600, 800)
    torch.manual_seed(generator.randrange(1 << 30))
    return tuple(torch.randn(1, 4, length, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))


@pytest.mark.parametrize(
    "attention", [causal, *(pytest.param(f, marks=pytest.mark.slow) for f in (vanilla, softcap, alibi))]
)
def test_attention_trains_without_its_scores_in_memory(attention: Attention, case: tuple[torch.Tensor, ...]) -> None:
    compiled = torch.compile(attention, backend="effcc")
    slope = torch.randn_like(case[0])
    found, wanted = compiled(*case), attention(*case)
    gradients = torch.autograd.grad(found, case, slope)
    assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, case, slope), strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    length = case[0].shape[2]
    whole = 4 * length * length * 8
    for report in effcc.reports():
        assert not report.fallbacks
        assert report.measured_peak is not None and report.measured_peak < whole


class SharedBias(torch.nn.Module):
    """Layers of attention that add one learned bias for the distance of two places to their scores."""

    def __init__(self, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(64, heads, dtype=torch.float64))
        self.mixing = torch.nn.ParameterList(
            torch.randn(width, width, dtype=torch.float64) / width**0.5 for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[2])
        distance = (places[None, :] - places[:, None]).abs().clamp(max=63)
        bias = self.table[distance].permute(2, 0, 1)[None]
        for weight in self.mixing:
            q = x @ weight
            x = x + torch.softmax(q @ x.transpose(-1, -2) / x.shape[-1] ** 0.5 + bias, -1) @ x
        return x


@pytest.mark.slow
def test_a_bias_that_layers_share(case: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's kernel looks the bias up and reduces its gradient into the table: no scores, no bias in memory,
    where memory is slow enough for that to pay."""
    monkeypatch.setattr(graph_compiler, "choice_for", lambda *_: Choice(Rates(bandwidth=5e8)))
    model, x = SharedBias(3, 4, 16), case[0]
    compiled = torch.compile(model, backend="effcc")

    def step(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return list(torch.autograd.grad(run(x).square().sum(), [x, *model.parameters()]))

    wide = x.shape[1] * x.shape[2] ** 2 * x.element_size()
    for own, expected in zip(step(compiled), step(model), strict=True):
        assert_close(own, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    assert sum(len(report.cascades) for report in effcc.reports()) // len(effcc.reports()) == 6
    _, peak = peak_growth(lambda: step(compiled))
    assert peak is not None and peak < wide


@pytest.mark.slow
def test_a_bias_that_layers_share_stays_whole_where_nothing_is_fused() -> None:
    model, x = SharedBias(2, 4, 512), torch.randn(1, 4, 200, 512, dtype=torch.float64)
    own = torch.autograd.grad(torch.compile(model, backend="effcc")(x).square().sum(), [*model.parameters()])
    expected = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    for mine, eager in zip(own, expected, strict=True):
        assert_close(mine, eager, rtol=1e-10, atol=1e-10 * eager.abs().max().item())
    assert not any(report.cascades for report in effcc.reports())


def test_a_decoding_step_reads_a_shared_cache_once() -> None:
    """One token's queries over a long cache, of which eager copies each head for the queries that share it."""

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        past = torch.arange(k.shape[-2]) < length
        return torch.softmax(scores(q, k).masked_fill(~past, float("-inf")), -1) @ v

    generator = fresh_random()
    torch.manual_seed(generator.randrange(1 << 30))
    cached, held = generator.randrange(4000, 5000), 3000
    inputs = [torch.randn(2, *size, dtype=torch.float64) for size in ((8, 1, 32), (2, cached, 32), (2, cached, 32))]
    compiled = torch.compile(step, backend="effcc", dynamic=False)
    with torch.no_grad():
        found = compiled(*inputs, torch.tensor(held))
        assert_close(found, step(*inputs, torch.tensor(held)), rtol=1e-10, atol=1e-10)
        assert len(effcc.reports()[-1].cascades) == 1
        _, growth = peak_growth(lambda: compiled(*inputs, torch.tensor(held)))
        assert growth is not None and growth < inputs[1].nbytes


def test_nothing_is_fused_where_that_is_not_wanted(case: tuple[torch.Tensor, ...]) -> None:
    torch.compile(causal, backend="effcc", options={"cascades": False})(*case)
    assert all("effcc.cascade" not in region.source for report in effcc.reports() for region in report.regions)


def test_what_is_masked_out_altogether_is_eagers_nan() -> None:
    size = random.randrange(600, 700)
    q = torch.randn(1, 2, size, 16, dtype=torch.float64)
    keep = torch.rand(size, size) < 0.5
    keep[3] = False

    def attention(q: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.softmax(scores(q, q).masked_fill(~keep, float("-inf")), -1) @ q

    found = torch.compile(attention, backend="effcc")(q, keep)
    assert_close(found, attention(q, keep), rtol=1e-10, atol=1e-10, equal_nan=True)
    assert found[:, :, 3].isnan().all() and F.one_hot(torch.tensor(3), size).sum() == found.isnan().any(-1)[0, 0].sum()


def test_the_report_shows_what_was_fused() -> None:
    q = torch.randn(1, 2, 640, 16)
    torch.compile(vanilla, backend="effcc")(q, q, q)
    (report,) = effcc.reports()
    (fused,) = report.cascades
    assert "test_cascades_in_use.py" in fused.source and fused.certificates
    assert fused.bytes_fused < fused.bytes_written / 2 and "#include" in fused.kernel


MODEL_FILE = """
import torch


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.joint = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.joint(x).view(1, LENGTH, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-1, -2) / 4.0).softmax(-1) @ v).transpose(1, 2).flatten(2)


model = Attention()


def example_inputs():
    return (torch.randn(1, LENGTH, 32),)


def loss(output):
    return output.square().mean()
"""


def test_an_offline_plan_has_the_kernels_and_the_peak_of_what_runs(tmp_path: Path) -> None:
    length = fresh_random().randrange(900, 1200)
    file = tmp_path / "attention.py"
    file.write_text(MODEL_FILE.replace("LENGTH", str(length)))
    planned = effcc.plan(str(file), train=True)
    spec: dict[str, Any] = {}
    exec(file.read_text(), spec)
    step = torch.compile(lambda x: spec["loss"](spec["model"](x)), backend="effcc")
    step(*spec["example_inputs"]()).backward()
    measured = max(report.measured_peak or 0 for report in effcc.reports())
    peak = planned.plan.peak["device"]
    assert abs(peak - measured) <= 0.03 * measured
    assert any("one kernel: 2" in note for note in planned.plan.notes)


def test_an_offline_plan_for_a_gpu_has_the_kernels(tmp_path: Path) -> None:
    file = tmp_path / "attention.py"
    file.write_text(MODEL_FILE.replace("LENGTH", str(fresh_random().randrange(3000, 4000))))
    planned = effcc.plan(str(file), train=True, device="h100")
    assert sum("cascade" in step.name for step in planned.plan.steps) == 2
    scores = max(buffer.bytes for buffer in planned.plan.buffers)
    assert scores < 3000 * 3000 * 4
