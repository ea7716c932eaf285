"""Sizes that change from call to call: right for each, and compiled once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import effcc
import pytest
import torch
from models import Tower, build, loss_of
from torch import nn
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("clean_compiler")


def compilations() -> int:
    """Forward or inference graphs so far."""
    return sum(report.phase != "backward" for report in effcc.reports())


def assert_no_fallbacks() -> None:
    assert [item for report in effcc.reports() for item in report.fallbacks] == []


def step(model: nn.Module, call: Callable[..., Any], x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input and of the parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    result = call(x)
    result.square().sum().backward()
    return [result.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic", "found at the second size"])
def test_training_over_batch_sizes(how: str) -> None:
    """One graph for all sizes above 1; where torch itself finds out that a size changes, a second one for the first."""
    plain = Tower(depth=2).double()
    model = copy.deepcopy(plain)
    run = torch.compile(model, backend="effcc", dynamic=True if how == "dynamic=True" else None)
    for size in (5, 3, 17, 2, 64):
        x = torch.randn(size, 8, dtype=torch.float64)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)

            def call(x: torch.Tensor) -> Any:
                torch._dynamo.mark_dynamic(x, 0)
                return run(x)
        else:
            call = run
        for left, right in zip(step(model, call, x), step(plain, plain, x), strict=True):
            assert_close(left, right, rtol=1e-10, atol=1e-12)
    assert compilations() == (2 if how.startswith("found") else 1)
    assert_no_fallbacks()


def test_sizes_that_are_refused_by_a_mark() -> None:
    """A function that needs one size of a dimension marked dynamic says so instead of compiling for it."""

    def run(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(4)

    x = torch.randn(4)
    torch._dynamo.mark_dynamic(x, 0)
    with pytest.raises(Exception, match=r"(?s)[Cc]onstraints violated"):
        torch.compile(run, backend="effcc")(x)


@pytest.mark.slow
def test_image_sizes() -> None:
    """Convolution, pooling and normalisation over batch, height and width. Inductor fixes the height and width of a
    convolution's backward when it lowers it (torch 2.13), so these compile anew; the batch does not."""
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3, stride=2)
    ).double()
    model = copy.deepcopy(plain)
    run = torch.compile(model, backend="effcc", dynamic=True)
    counts = []
    for size in ((2, 3, 16, 18), (3, 3, 20, 14), (5, 3, 12, 30), (4, 3, 12, 30), (7, 3, 12, 30)):
        x = torch.randn(size, dtype=torch.float64)
        for left, right in zip(step(model, run, x), step(plain, plain, x), strict=True):
            assert_close(left, right, rtol=1e-10, atol=1e-11)
        counts.append(compilations())
    for left, right in zip(model.buffers(), plain.buffers(), strict=True):
        assert_close(left, right, rtol=1e-10, atol=1e-12)
    assert counts[2:] == [counts[2]] * 3


def test_sequence_length_and_batch_of_a_language_model() -> None:
    """GPT-2's forward without gradients; with them see below."""
    model = build("gpt2").model.double().eval()
    run = torch.compile(model, backend="effcc", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 16), (3, 7), (5, 12)):
            ids = torch.randint(0, 97, shape)
            assert_close(run(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-10, atol=1e-11)
    assert compilations() <= 3, "more graphs than GPT-2 has pieces"
    assert_no_fallbacks()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_training_of_language_models_over_lengths(name: str) -> None:
    sample = build(name)
    plain = sample.model.double().train()
    model = copy.deepcopy(plain)
    run = torch.compile(model, backend="effcc", dynamic=True)
    graphs = []
    tolerance = 1e-5 if name == "llama" else 1e-10
    for shape in ((2, 16), (3, 7), (5, 12), (2, 9)):
        ids, target = torch.randint(0, 97, shape), torch.randint(0, 97, shape)
        for each, call in ((plain, plain), (model, run)):
            each.zero_grad()
            loss_of(call(input_ids=ids), target).backward()
        for (key, left), right in zip(model.named_parameters(), plain.parameters(), strict=True):
            if right.grad is not None:
                scale = max(right.grad.abs().max().item(), 1e-4)
                assert (left.grad - right.grad).abs().max().item() <= tolerance * scale, (key, shape)
        graphs.append(compilations())
    assert graphs[1:] == graphs[1:2] * 3, f"graphs after each size: {graphs}"


def test_arithmetic_on_sizes() -> None:
    """Sizes in views, slices, ranges, masks and scalars."""

    def run(x: torch.Tensor) -> tuple[Any, ...]:
        rows, columns = x.shape
        half = rows // 2
        return (
            x[:half].sum(0) / rows,
            x.reshape(-1)[: half * columns].view(half, columns),
            torch.arange(rows * 2).view(rows, 2).sum(1),
            torch.cat([x, x[-1:]]).tril(),
            x.new_full((columns, rows), float(rows)) + x.t(),
            rows + columns,
        )

    call = torch.compile(run, backend="effcc", dynamic=True, fullgraph=True)
    for shape in ((4, 6), (7, 3), (10, 12)):
        x = torch.randn(shape, dtype=torch.float64)
        for left, right in zip(call(x), run(x), strict=True):
            assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert compilations() == 1


def test_numbers_that_change() -> None:
    """Python integers and floats among the arguments, in float64 to the last digits."""

    def run(x: torch.Tensor, scale: float, count: int) -> torch.Tensor:
        return (x * scale).cumsum(0) + count

    call = torch.compile(run, backend="effcc", dynamic=True)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    for scale, count in ((0.1, 3), (1 / 3, 5), (2 / 7, 11)):
        assert_close(call(x, scale, count), run(x, scale, count), rtol=1e-14, atol=1e-14)


def test_shapes_that_only_the_data_gives() -> None:
    """``nonzero`` and boolean masks inside one graph, in training."""

    def run(x: torch.Tensor) -> torch.Tensor:
        chosen = x[x > 0]
        return (chosen * 2).sin().sum() + chosen.shape[0]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        call = torch.compile(run, backend="effcc", fullgraph=True)
        for seed in range(3):
            torch.manual_seed(seed)
            left = torch.randn(9, dtype=torch.float64, requires_grad=True)
            right = left.detach().clone().requires_grad_()
            found, wanted = call(left), run(right)
            assert_close(found, wanted, rtol=1e-12, atol=1e-12)
            found.backward()
            wanted.backward()
            assert_close(left.grad, right.grad, rtol=1e-12, atol=1e-12)
    assert compilations() == 1
