"""Buffers, caches and inputs that change in place, outputs that alias, values loaded or copied after compiling."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import effcc
import pytest
import torch
from models import Tower
from torch import nn
from torch.testing import assert_close
from towers import assert_equal_gradients, compile_plain, pair, rows

pytestmark = pytest.mark.usefixtures("clean_compiler")

Compiler = Callable[..., Any]


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


@pytest.mark.slow
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


@pytest.mark.parametrize("saved", [False, True])
def test_in_place_on_an_input_that_needs_a_gradient(saved: bool) -> None:
    """``saved``: the backward needs the value that is overwritten. torch's own capture then ends in autograd's error
    about in-place operations (aot_eager too), which is a refusal by name."""

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if saved:
            x.mul_(w)
        else:
            x.add_(w)
        return (x.sin() * w).sum()

    slopes = []
    for call in (run, compile_plain(run)):
        w = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).requires_grad_()
        base = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
        x = base * 1
        loss = call(x, w)
        try:
            loss.backward()
        except RuntimeError as error:
            assert saved and call is not run and "modified by an inplace operation" in str(error)
            return
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
