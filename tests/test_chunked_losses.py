"""Losses over a large vocabulary are computed in chunks of tokens, gradients in the forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import effcc
import pytest
import torch
import torch.nn.functional as F
from effcc import cascade_fusion
from effcc.passes.raising.choose import Choice
from effcc.torch_internals import peak_growth
from fresh_seed import fresh_random
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("clean_compiler")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of tests are small, and large for these."""
    small = functools.partial(Choice, wide_bytes=1 << 16)
    monkeypatch.setattr(cascade_fusion, "Choice", small)
    monkeypatch.setattr(cascade_fusion, "CHUNK_BYTES", 1 << 16)


def plain(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def smoothed(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), label_smoothing=0.1, reduction="sum")


def capped(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return plain(5 * torch.tanh(logits / 5), target)


def with_z_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return plain(logits, target) + 1e-2 * torch.logsumexp(logits, -1).square().mean()


def focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Written out: -(1 - p)^2 log p."""
    log_p = F.log_softmax(logits, -1).gather(-1, target.clamp(min=0)[..., None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Head(torch.nn.Module):
    def __init__(self, width: int, words: int, bias: bool, loss: Loss) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, words, bias=bias)
        self.loss = loss

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(self.linear(x), target)


def drawn(loss: Loss, dtype: torch.dtype = torch.float64) -> tuple[Head, torch.Tensor, torch.Tensor]:
    """A head and input of random sizes: 2 x 600 or 1100 tokens and more, some of them ignored."""
    random = fresh_random()
    torch.manual_seed(random.getrandbits(32))
    shape = random.choice([(2, random.randrange(600, 700)), (random.randrange(1100, 1400),)])
    width, words = random.randrange(120, 150), random.randrange(200, 300)
    target = torch.randint(0, words, shape)
    target[..., ::7] = -100
    head = Head(width, words, random.random() < 0.5, loss).to(dtype)
    return head, torch.randn(*shape, width, dtype=dtype, requires_grad=True), target


def gradients(run: Callable[..., Any], head: Head, x: torch.Tensor, target: torch.Tensor) -> tuple[Any, ...]:
    loss = run(x, target)
    return loss.detach(), *torch.autograd.grad(3.7 * loss.sum(), [x, *head.parameters()])


def fused() -> list[str]:
    return [cascade.name for report in effcc.reports() for cascade in report.cascades]


@pytest.mark.parametrize(
    "loss", [plain, *(pytest.param(f, marks=pytest.mark.slow) for f in (with_z_loss, smoothed, capped, focal))]
)
def test_loss_and_gradients(loss: Loss) -> None:
    head, x, target = drawn(loss)
    found = gradients(torch.compile(head, backend="effcc", fullgraph=True), head, x, target)
    assert any(name.startswith("chunked") for name in fused()), effcc.reports()[-1].not_fused
    for mine, theirs in zip(found, gradients(head, head, x, target), strict=True):
        assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_bfloat16_is_as_near_as_eager() -> None:
    head, x, target = drawn(plain, torch.bfloat16)
    found = gradients(torch.compile(head, backend="effcc"), head, x, target)
    assert any(name.startswith("chunked") for name in fused()), effcc.reports()[-1].not_fused
    eager = gradients(head, head, x, target)
    exact = gradients(head.double(), head, x.detach().double().requires_grad_(), target)
    for mine, theirs, right in zip(found, eager, exact, strict=True):
        error = (theirs - right).abs().max()
        assert (mine - right).abs().max() <= 2 * error + 8e-3 * right.abs().max()


@pytest.mark.slow
def test_without_gradients() -> None:
    head, x, target = drawn(plain)
    with torch.no_grad():
        assert_close(torch.compile(head, backend="effcc")(x, target), head(x, target), rtol=1e-12, atol=0)
    assert fused()


@pytest.mark.slow
def test_gradient_for_each_token_is_not_known_early() -> None:
    def each(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")

    head, x, target = drawn(each)
    found = gradients(torch.compile(head, backend="effcc"), head, x, target)
    assert not any(name.startswith("chunked") for name in fused())
    for mine, theirs in zip(found, gradients(head, head, x, target), strict=True):
        assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_two_losses_with_gradients_of_their_own() -> None:
    def both(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.stack([plain(logits, target), torch.logsumexp(logits, -1).square().mean()])

    head, x, target = drawn(both)
    found = gradients(torch.compile(head, backend="effcc"), head, x, target)
    for mine, theirs in zip(found, gradients(head, head, x, target), strict=True):
        assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_logits_are_never_whole() -> None:
    """Peak memory of a step: gradients and a chunk, not tokens x words."""
    head, x, target = drawn(plain)
    run = torch.compile(head, backend="effcc")
    gradients(run, head, x, target)
    logits = target.numel() * head.linear.out_features * 8
    results = sum(each.numel() * 8 for each in (x, *head.parameters()))
    _, peak = peak_growth(lambda: gradients(run, head, x, target))
    assert peak is not None and peak < results + logits / 2
