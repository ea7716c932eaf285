"""What training code does besides a forward and a backward: each right, or refused or fallen back with a named reason.

Towers of equal layers run flat and with their layers compiled once and called several times.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import effcc
import pytest
import torch
import torch.nn.functional as F
from models import Block, Tower
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("clean_compiler")

Compiler = Callable[..., Any]


@pytest.fixture(params=["flat", "marked"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """``torch.compile`` with the backend; ``marked``: the layers of a Tower are one region that is called repeatedly."""
    if request.param == "marked":
        monkeypatch.setattr(Block, "forward", torch.compiler.nested_compile_region(Block.forward))

    def compile_(model: Any, options: dict[str, Any] | None = None, **settings: Any) -> Any:
        # The hand-made marks and the automatic ones are tested apart.
        return torch.compile(model, backend="effcc", options={"repeated_modules": False} | (options or {}), **settings)

    return compile_


def compile_plain(model: Any, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    return torch.compile(model, backend="effcc", options=options or {}, **settings)


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
    """Two backwards through one forward, and a third after another forward: right, or refused by name before any damage."""
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


@pytest.mark.parametrize("where", ["inside", "around", "around, reentrant"])
def test_checkpoint(where: str) -> None:
    plain = (CheckpointedTower if where == "inside" else Tower)().double()
    model = copy.deepcopy(plain)
    x = rows()
    run = compile_plain(model)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    if where == "inside":
        found = run(left)
    else:
        found = checkpoint(run, left, use_reentrant=where.endswith("reentrant"))
    found.square().sum().backward()
    plain(right).square().sum().backward()
    assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12)
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


# Mutation and aliasing


def test_batch_norm_buffers_over_several_steps() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    model = copy.deepcopy(plain)
    run = compile_plain(model)
    for _ in range(4):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        plain(x).square().mean().backward()
        run(x).square().mean().backward()
    for (name, left), right in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert_close(left, right, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert int(model[1].num_batches_tracked) == 4
    assert_equal_gradients(model, plain)
    with torch.no_grad():
        assert_close(run.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_key_value_cache(cache: str) -> None:
    """Prefill and four greedy steps of a Llama: the cache is written in place, or grows by concatenation."""
    from models import build
    from transformers import DynamicCache, StaticCache

    model = build("llama").model.double().eval()
    model.config.use_cache = True
    run = compile_plain(model, dynamic=cache == "dynamic")

    def generate(call: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        ids = torch.arange(12).reshape(2, 6) % 97
        store = StaticCache(model.config, max_cache_len=16) if cache == "static" else DynamicCache(config=model.config)
        logits, position = [], torch.arange(6)
        with torch.no_grad():
            for _ in range(5):
                result = call(input_ids=ids, past_key_values=store, position_ids=position[None].expand(2, -1))
                logits.append(result.logits[:, -1])
                ids = logits[-1].argmax(-1, keepdim=True)
                position = position[-1:] + 1
        return logits, store.layers[0].keys

    wanted, wanted_keys = generate(model)
    found, keys = generate(run)
    for left, right in zip(found, wanted, strict=True):
        assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert_close(keys, wanted_keys, rtol=1e-5, atol=1e-6)


def test_outputs_that_alias_inputs() -> None:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x, x.view(-1), x[1], x.t(), x + 1

    x = rows(3, 4)
    whole, flat, row, turned, new = compile_plain(run)(x)
    assert whole is x
    for view in (flat, row, turned):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert new.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    x.fill_(7)
    assert (flat == 7).all() and (row == 7).all() and (turned == 7).all() and not (new == 8).all()
    assert turned.shape == (4, 3)


def test_outputs_that_alias_each_other() -> None:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        return y, y.t(), y[0], y.view(-1)[2:5]

    x = rows(3, 4).requires_grad_()
    results = compile_plain(run)(x)
    for left, right in zip(results, run(x), strict=True):
        assert_close(left, right)
        assert left.stride() == right.stride()
        assert left.untyped_storage().data_ptr() == results[0].untyped_storage().data_ptr()
    sum(result.sum() for result in results).backward()
    twin = x.detach().clone().requires_grad_()
    sum(result.sum() for result in run(twin)).backward()
    assert_close(x.grad, twin.grad)


def test_inputs_that_alias_each_other() -> None:
    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return a * b

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        base = torch.arange(10.0)
        return base[:6], base[4:]

    a, b = inputs()
    c, d = inputs()
    assert_close(compile_plain(run)(a, b), run(c, d))
    assert_close(b, d)


@pytest.mark.parametrize("kind", ["whole", "view", "copy", "resize of a list", "under no_grad"])
def test_in_place_on_inputs(kind: str) -> None:
    def run(x: torch.Tensor, y: torch.Tensor, bag: list[torch.Tensor]) -> torch.Tensor:
        if kind == "whole":
            x.mul_(y).add_(1)
        elif kind == "view":
            x[0].mul_(2)
            x[:, 1:].add_(y[:, 1:])
        elif kind == "copy":
            x.copy_(y.t().contiguous().t() * 3)
        elif kind == "resize of a list":
            bag.append(x * y)
            bag[0].zero_()
        else:
            with torch.no_grad():
                x.sub_(y)
        return x.sin() + y

    x, y, bag = rows(3, 4), rows(3, 4), [rows(2, 2)]
    others = x.clone(), y.clone(), [bag[0].clone()]
    found, wanted = compile_plain(run)(x, y, bag), run(*others)
    assert_close(found, wanted)
    assert_close(x, others[0])
    assert_close(y, others[1])
    assert len(bag) == len(others[2])
    for left, right in zip(bag, others[2], strict=True):
        assert_close(left, right)


def test_in_place_on_an_input_that_needs_a_gradient() -> None:
    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x.mul_(w)
        return (x * w).sum()

    slopes = []
    for call in (run, compile_plain(run)):
        w = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).requires_grad_()
        base = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
        x = base * 1
        call(x, w).backward()
        slopes.append((base.grad, w.grad, x.detach()))
    for left, right in zip(slopes[1], slopes[0], strict=True):
        assert_close(left, right)


# State and copies


def test_load_state_dict_after_compile(compiled: Compiler) -> None:
    plain, model = pair()
    run, x = compiled(model), rows()
    run(x)
    graphs = len(effcc.reports())
    other = Tower().double()
    run.load_state_dict({f"_orig_mod.{name}": value for name, value in other.state_dict().items()})
    assert_close(run(x), other(x), rtol=1e-10, atol=1e-12)
    model.load_state_dict(plain.state_dict())
    assert_close(run(x), plain(x), rtol=1e-10, atol=1e-12)
    assert len(effcc.reports()) == graphs, "loading values must not compile again"
    model.load_state_dict(other.state_dict(), assign=True)
    assert_close(run(x), other(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_of_a_compiled_module(way: str) -> None:
    model = Tower().double()
    x = rows()
    model.compile(backend="effcc")
    wanted = model(x)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = Tower().double()
        twin.load_state_dict(model.state_dict())
    assert_close(twin(x), wanted, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        twin.head.bias.add_(1)
    assert_close(twin(x), wanted + 1, rtol=1e-10, atol=1e-12)
    assert_close(model(x), wanted, rtol=1e-10, atol=1e-12)


def test_deepcopy_of_the_wrapper(compiled: Compiler) -> None:
    _, model = pair()
    run, x = compiled(model), rows()
    wanted = run(x)
    twin = copy.deepcopy(run)
    with torch.no_grad():
        twin.head.bias.add_(1)
    assert_close(twin(x), wanted + 1, rtol=1e-10, atol=1e-12)
    assert_close(run(x), wanted, rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize("marked", [False, True])
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


# Calls from several places


def test_threads_compile_and_run_at_once() -> None:
    """Four threads, four shapes of model, training; then all four run one shared compiled model."""
    towers = [Tower(width=4 + 2 * index, depth=2).double() for index in range(4)]
    inputs = [rows(3, 4 + 2 * index) for index in range(4)]
    wanted = []
    for tower, x in zip(towers, inputs, strict=True):
        tower(x).square().sum().backward()
        wanted.append([parameter.grad.clone() for parameter in tower.parameters()])
        tower.zero_grad()
    shared = compile_plain(Tower(depth=2).double())
    common = rows()
    with torch.no_grad():
        shared_wanted = shared._orig_mod(common)
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            compile_plain(towers[index])(inputs[index]).square().sum().backward()
            for parameter, right in zip(towers[index].parameters(), wanted[index], strict=True):
                assert_close(parameter.grad, right, rtol=1e-10, atol=1e-12)
            with torch.no_grad():
                for _ in range(20):
                    assert_close(shared(common), shared_wanted, rtol=1e-10, atol=1e-12)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def test_graph_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    model = copy.deepcopy(plain)

    def run(parts: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        h = parts[0](x).relu()
        print("between", tuple(h.shape))
        torch._dynamo.graph_break()
        if h.sum().item() > 1e9:
            return h
        return parts[1](h)

    x = rows()
    compile_plain(run)(model, x).square().sum().backward()
    run(plain, x).square().sum().backward()
    assert_equal_gradients(model, plain)
    assert capsys.readouterr().out.count("between (5, 8)") == 2
    assert len([report for report in effcc.reports() if report.phase == "forward"]) >= 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(compiled: Compiler, context: Any) -> None:
    plain, model = pair()
    run, x = compiled(model), rows()
    with context():
        found = run(x)
    assert not found.requires_grad and found.is_inference() == (context is torch.inference_mode)
    assert_close(found, plain(x).detach(), rtol=1e-10, atol=1e-12)
    run(x).sum().backward()
    plain(x).sum().backward()
    assert_equal_gradients(model, plain)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_on_the_cpu(mode: str) -> None:
    plain, model = pair(depth=1)
    run = torch.compile(model, backend="effcc", mode=mode)
    x = rows()
    run(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_equal_gradients(model, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True])
def test_reduce_overhead_on_cuda(train: bool) -> None:
    """CUDA graphs: new inputs in place of old ones, several steps, results that are kept past the next call."""
    plain, model = (tower.float().cuda() for tower in pair())
    run = torch.compile(model, backend="effcc", mode="reduce-overhead")
    for _ in range(5):
        x = torch.randn(5, 8, device="cuda")
        with torch.set_grad_enabled(train):
            torch.compiler.cudagraph_mark_step_begin()
            found, wanted = run(x), plain(x)
            assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            if train:
                model.zero_grad()
                plain.zero_grad()
                found.square().sum().backward()
                wanted.square().sum().backward()
                for left, right in zip(model.parameters(), plain.parameters(), strict=True):
                    assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)
