"""Compiled functions called from threads, across graph breaks, without gradients, in other modes."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import effcc
import pytest
import torch
from models import Tower
from some_by_default import some_by_default
from torch import nn
from torch.testing import assert_close
from towers import assert_equal_gradients, compile_plain, pair, rows

pytestmark = pytest.mark.usefixtures("clean_compiler")

Compiler = Callable[..., Any]


# Calls from several places


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 6])
def test_threads_compile_and_run_at_once(count: int) -> None:
    """Each thread trains a model of another shape; then all run one shared compiled model."""
    towers = [Tower(width=4 + 2 * index, depth=2).double() for index in range(count)]
    inputs = [rows(3, 4 + 2 * index) for index in range(count)]
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

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(count)]
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


@pytest.mark.parametrize("context", some_by_default([torch.no_grad, torch.inference_mode], {torch.inference_mode}))
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


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow) for mode in ("reduce-overhead", "max-autotune-no-cudagraphs")]
)
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


# What a run tells


def test_the_first_run_measures_its_peak() -> None:
    """Known bytes: three square matrices of the product, of which one is freed before the last is made."""
    size = random.randrange(32, 96)
    matrix = size * size * 8
    compiled = torch.compile(lambda x: (x @ x) @ x, backend="effcc")
    x = rows(size, size)
    compiled(x)
    (report,) = effcc.reports()
    assert report.measured_peak == 3 * matrix  # the input, the product, the result
    report.measured_peak = None
    compiled(x)
    assert report.measured_peak is None, "later runs measure nothing"


def test_nothing_is_measured_while_the_user_profiles() -> None:
    compiled = torch.compile(lambda x: (x @ x).sum(), backend="effcc")
    with torch.profiler.profile() as profile:
        compiled(rows(8, 8))
    (report,) = effcc.reports()
    assert report.measured_peak is None and report.runs == 1
    assert any("mm" in event.name for event in profile.events())
