"""Swapping saved values to the host: the two ops, and a training step that keeps its budget by them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import effcc
import pytest
import torch
from effcc import activation_planner
from effcc.errors import SwapError
from effcc.passes.activation.host_link import HostLink
from effcc.runtime import host_tier
from test_memory_budget import gradients, measured_peak, tower
from torch.profiler import profile
from towers import unfused_step

pytestmark = pytest.mark.usefixtures("clean_compiler")


@pytest.fixture(autouse=True)
def swap_directory(tmp_path: Path) -> Path:
    host_tier.set_directory(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(7, 5),
        torch.randn(6, 4).t(),
        torch.randn(3, 8, dtype=torch.bfloat16)[:, ::2],
        torch.arange(11),
        torch.tensor(2.5),
        torch.empty(0, 4),
        torch.tensor([True, False, True]),
    ],
    ids=lambda value: f"{value.dtype}-{list(value.shape)}-{value.stride()}",
)
def test_what_comes_back_is_bit_identical(value: torch.Tensor) -> None:
    handle = torch.ops.effcc.swap_out(value)
    assert handle.numel() == 1 and handle.dtype == torch.uint8
    back = torch.ops.effcc.swap_in(handle, list(value.shape), list(value.stride()), value.dtype, value.device)
    assert back.stride() == value.stride() and torch.equal(back, value)


def test_no_file_is_left_and_the_allocator_holds_nothing(swap_directory: Path) -> None:
    value = torch.randn(1 << 16)
    with profile(profile_memory=True) as record:
        handle = torch.ops.effcc.swap_out(value)
    held = sum(e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    assert held < 1024
    assert list(swap_directory.iterdir()) == []
    assert handle.untyped_storage().nbytes() == value.nbytes


def test_a_full_disk_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, swap_directory: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SwapError, match="No space left") as caught:
        torch.ops.effcc.swap_out(torch.randn(16))
    assert str(swap_directory) in str(caught.value)
    assert list(swap_directory.iterdir()) == []


def test_a_missing_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    host_tier.set_directory(tmp_path / "missing")
    with pytest.raises(SwapError, match="missing"):
        torch.ops.effcc.swap_out(torch.randn(16))


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    program = (
        "import os, signal, torch\n"
        "from effcc.runtime import host_tier\n"
        f"host_tier.set_directory({str(tmp_path)!r})\n"
        "kept = [torch.ops.effcc.swap_out(torch.randn(1000)) for _ in range(3)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_a_step_keeps_its_budget_by_swapping(monkeypatch: pytest.MonkeyPatch, swap_directory: Path) -> None:
    # As if the disk were fast: recomputation would be chosen otherwise.
    fast = HostLink(out=1e15, back=1e15, latency=1e-12, capacity=1 << 50, overlapped=False)
    monkeypatch.setattr(activation_planner, "host_link", lambda device: fast)
    model, inputs = tower(rows=256)

    step = unfused_step(model, inputs, {})
    loss = step()
    wanted = gradients(model)
    plain = measured_peak(model, inputs, step)
    budget = int(0.75 * plain)
    options = {"memory_budget": budget, "swap": True, "swap_dir": str(swap_directory)}
    step = unfused_step(model, inputs, options)
    assert torch.equal(step(), loss)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, wanted[name]), name
    choice = effcc.reports()[-1].activation
    assert choice is not None and choice.swapped_bytes > 0
    assert any(row.fate == "swap" for row in choice.rows)
    assert measured_peak(model, inputs, step) <= budget
    assert list(swap_directory.iterdir()) == []
