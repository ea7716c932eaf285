"""What training code does besides a forward and a backward: mixed precision, backwards in unusual order, checkpoints,
hooks. Each is right, or refused or fallen back with a named reason.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Tower
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from towers import assert_equal_gradients, assert_no_fallbacks, compile_plain, pair, rows

pytestmark = pytest.mark.usefixtures("clean_compiler")

Compiler = Callable[..., Any]


# Mixed precision


def test_autocast_around_the_model(compiled: Compiler) -> None:
    plain, model = (tower.float() for tower in pair())
    x = rows().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = plain(x)
        found = compiled(model)(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    wanted.float().square().mean().backward()
    found.float().square().mean().backward()
    assert_close(found, wanted, rtol=0.02, atol=0.02)
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        assert left.grad is not None and left.grad.dtype == torch.float32
        assert_close(left.grad, right.grad, rtol=0.05, atol=0.02)


def test_autocast_inside_and_a_second_call_outside_of_it() -> None:
    linear = nn.Linear(8, 8)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = linear(x)
        return low, linear(x)

    x = torch.randn(4, 8)
    low, full = compile_plain(run)(x)
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert_close(full, linear(x))
    assert_close(low, run(x)[0], rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_gradient_scaler(compiled: Compiler) -> None:
    """Scaled steps, and one whose gradients overflow and which therefore leaves the parameters as they are."""
    plain, model = (tower.float() for tower in pair())
    run = compiled(model)
    for tower, call in ((plain, plain), (model, run)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
        torch.manual_seed(1)
        for step in range(3):
            x = torch.randn(5, 8)
            before = tower.head.weight.detach().clone()
            optimizer.zero_grad()
            loss = call(x).square().mean() * (float("inf") if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, tower.head.weight) == (step == 1)
        assert scaler.get_scale() == 512.0
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(left, right, rtol=1e-4, atol=1e-5)


# Backward in unusual order


@pytest.mark.parametrize("order", ["together", "in order", "reversed"])
def test_two_forwards_before_a_backward(compiled: Compiler, order: str) -> None:
    plain, model = pair()
    first, second = rows(), rows()
    for tower, call in ((plain, plain), (model, compiled(model))):
        losses = [call(first).square().sum(), call(second).sin().sum()]
        if order == "together":
            (losses[0] + losses[1]).backward()
        else:
            for loss in losses if order == "in order" else reversed(losses):
                loss.backward()
        assert tower.head.weight.grad is not None
    assert_equal_gradients(model, plain)
    assert_no_fallbacks()


def test_forward_without_a_backward(compiled: Compiler) -> None:
    """A forward whose result is dropped (validation with gradients on) leaves the next step alone."""
    plain, model = pair()
    run, x = compiled(model), rows()
    for _ in range(3):
        run(rows())
    run(x).square().mean().backward()
    plain(x).square().mean().backward()
    assert_equal_gradients(model, plain)


def test_retain_graph(compiled: Compiler) -> None:
    """Two backwards through one forward, the second after another forward: right, or refused by name."""
    plain, model = pair()
    x = rows()
    run = compiled(model)
    loss = run(x).square().mean()
    try:
        loss.backward(retain_graph=True)
    except RuntimeError as error:
        assert "retain_graph" in str(error)
        return
    run(rows())
    loss.backward()
    wanted = plain(x).square().mean()
    wanted.backward(retain_graph=True)
    wanted.backward()
    assert_equal_gradients(model, plain)


def test_double_backward_is_refused_by_name(compiled: Compiler) -> None:
    _, model = pair()
    x = rows().requires_grad_()
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        (slope,) = torch.autograd.grad(compiled(model)(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()


def test_gradient_of_inputs_and_only_some_parameters(compiled: Compiler) -> None:
    plain, model = pair()
    for tower in (plain, model):
        tower.layers[1].requires_grad_(False)
        tower.head.bias.requires_grad_(False)
    left, right = rows(), None
    left.requires_grad_()
    right = left.detach().clone().requires_grad_()
    compiled(model)(left).square().sum().backward()
    plain(right).square().sum().backward()
    assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12)
    assert_equal_gradients(model, plain)


def test_hooks_on_parameters_and_modules(compiled: Compiler) -> None:
    """Optimizer-in-backward (a hook that steps as soon as a gradient is there) and forward hooks see eager's values."""
    seen: list[list[float]] = []
    results = []
    for index, tower in enumerate(pair()):
        seen.append([])
        tower.head.register_forward_hook(lambda module, inputs, output: output * 2)
        for parameter in tower.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda value, log=seen[-1]: log.append(value.grad.abs().sum().item())
            )
        run = compiled(tower) if index else tower
        torch.manual_seed(3)
        result = run(rows())
        result.square().mean().backward()
        results.append(result.detach())
    assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
    assert len(seen[0]) == len(list(Tower().parameters()))
    assert sorted(seen[1]) == pytest.approx(sorted(seen[0]), rel=1e-9)


# Checkpointing and saved tensors


class CheckpointedTower(Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize("where", ["inside", "around", pytest.param("around, reentrant", marks=pytest.mark.slow)])
def test_checkpoint(where: str) -> None:
    plain = (CheckpointedTower if where == "inside" else Tower)().double()
    model = copy.deepcopy(plain)
    x = rows()
    run = compile_plain(model)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    call = run if where == "inside" else lambda x: checkpoint(run, x, use_reentrant=where.endswith("reentrant"))
    found = call(left)
    found.square().sum().backward()
    plain(right).square().sum().backward()
    assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12)
    assert_equal_gradients(model, plain)


@pytest.mark.slow
def test_selective_checkpoint() -> None:
    """A policy that keeps the results of products and computes the rest again."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def run(tower: Tower, x: torch.Tensor) -> torch.Tensor:
        for layer in tower.layers:
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            x = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
        return tower.head(x)

    plain, model = pair()
    x = rows()
    compile_plain(run)(model, x).square().sum().backward()
    run(plain, x).square().sum().backward()
    assert_equal_gradients(model, plain)


@pytest.mark.parametrize("where", ["inside", "around"])
def test_dropout_is_replayed_by_checkpoint(where: str) -> None:
    """x appears in the output as x * mask * 2, so its gradient must be 2 exactly where the output is not 0."""

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x * 1.5, 0.5) / 1.5

    x = torch.ones(4000, dtype=torch.float64, requires_grad=True)
    if where == "inside":
        result = compile_plain(lambda x: checkpoint(noisy, x, use_reentrant=False).sin())(x)
        slope = torch.cos(torch.where(result != 0, 2.0, 0.0).double()) * 2
    else:
        result = checkpoint(compile_plain(noisy), x, use_reentrant=False)
        slope = torch.full_like(x, 2.0)
    result.sum().backward()
    kept = result != 0
    assert 0.4 < kept.double().mean().item() < 0.6
    assert x.grad is not None
    assert torch.equal(x.grad != 0, kept)
    assert_close(x.grad[kept], slope.detach()[kept])


def test_saved_tensor_hooks_around(compiled: Compiler) -> None:
    """Hooks that pack saved tensors to bytes: called, and the gradients are eager's."""
    plain, model = pair()
    packed: list[int] = []

    def pack(value: torch.Tensor) -> tuple[bytes, torch.Tensor]:
        packed.append(value.numel())
        return value.detach().clone().numpy().tobytes(), value.detach()

    def unpack(item: tuple[bytes, torch.Tensor]) -> torch.Tensor:
        data, like = item
        if like.numel() == 0:
            return like
        return torch.frombuffer(bytearray(data), dtype=like.dtype).reshape(like.shape)

    x = rows()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = compiled(model)(x).square().mean()
    loss.backward()
    plain(x).square().mean().backward()
    assert packed
    assert_equal_gradients(model, plain)


def test_save_on_cpu(compiled: Compiler) -> None:
    plain, model = pair()
    x = rows()
    with torch.autograd.graph.save_on_cpu():
        loss = compiled(model)(x).square().mean()
    loss.backward()
    plain(x).square().mean().backward()
    assert_equal_gradients(model, plain)
