"""``effcc.train_step`` when something goes wrong: a clear error or the right answer, and never a file left behind."""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import effcc
import pytest
import torch
from effcc.errors import BudgetError, SwapError, TrainStepError
from subprocesses import environment, results, start
from train_steps import adamw, batches, loss_of, network, ordinary, same_values, stepped

#: Trains in a process of its own; the loss function is called at the end of each forward.
PROGRAM = """
import json, sys, torch, effcc
from train_steps import adamw, batches, loss_of, network, stepped
model = network()
def loss_fn(outputs, target):
    {interrupt}
    return loss_of(outputs, target)
step = effcc.train_step(model, adamw(model.parameters()), loss_fn, memory_budget="250KiB", swap_dir={folder!r})
print(json.dumps(dict(losses=stepped(step, batches(4)))))
"""


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """While it lasts, no file may grow beyond ``size`` bytes: to this process, the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def made(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """A step of a small model under a tight budget, and the model."""
    model = network()
    settings = {"memory_budget": "250KiB", "swap_dir": folder, **settings}
    return effcc.train_step(model, adamw(model.parameters()), settings.pop("loss_fn", loss_of), **settings), model


def losses_of(data: Any) -> list[float]:
    model = network()
    return ordinary(model, adamw(model.parameters()), data)


def test_a_disk_that_is_full_when_the_step_is_made(tmp_path: Path) -> None:
    model = network()
    with file_limit(1 << 16), pytest.raises(SwapError, match=r"(?s)cannot be swapped out.*Free space"):
        effcc.train_step(model, adamw(model.parameters()), loss_of, memory_budget="250KiB", swap_dir=tmp_path)
    assert same_values(model, network()), "the model is as it was"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SwapError, match="missing"):
        made(tmp_path / "missing")


def test_a_disk_that_is_full_before_anything_was_updated(tmp_path: Path) -> None:
    step, model = made(tmp_path)
    data = batches(3)
    with file_limit(step.store.file.size), pytest.raises(SwapError, match="cannot be swapped out"):
        step(*data[0])  # what is saved for the backward finds no room
    assert same_values(model, network())
    assert stepped(step, data) == losses_of(data)


def test_a_disk_that_fails_in_the_middle_of_the_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, model = made(tmp_path)
    data = batches(4)
    first = stepped(step, data[:2])
    state = copy.deepcopy(step.state_dict())
    step(*data[2])
    write, seen = os.pwrite, [0]

    def failing(*arguments: Any) -> int:
        seen[0] += 1
        if step.updates.updated >= 4:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(SwapError, match="No space left"):
        step(*data[3])
    monkeypatch.undo()
    with pytest.raises(TrainStepError, match="part of the parameters had been updated: SwapError"):
        step(*data[3])
    with pytest.raises(TrainStepError, match="part of the parameters"):
        step.state_dict()
    step.load_state_dict(state)
    wanted = network()
    optimizer = adamw(wanted.parameters())
    assert first == ordinary(wanted, optimizer, data[:2])
    assert stepped(step, data[2:]) == ordinary(wanted, optimizer, data[2:])
    assert same_values(model, wanted)


@pytest.mark.parametrize("grown_again", [False, True])
def test_a_swap_file_that_is_cut_short(grown_again: bool, tmp_path: Path) -> None:
    step, model = made(tmp_path)
    data = batches(3)
    stepped(step, data[:1])
    assert list(tmp_path.iterdir()) == [], "it has no name that it could be deleted by"
    size = step.store.file.size
    os.ftruncate(step.store.file.descriptor, 4096)
    if grown_again:
        os.ftruncate(step.store.file.descriptor, size)
    match = "does not hold what was written" if grown_again else "cut short"
    for _ in range(2):
        with pytest.raises(SwapError, match=match):
            step(*data[1])
    with pytest.raises(SwapError, match=match):
        model.state_dict()


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "swap"
    folder.mkdir()
    kill = "import os; loss_fn.calls = getattr(loss_fn, 'calls', 0) + 1; loss_fn.calls < 3 or os.kill(os.getpid(), 9)"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(interrupt=kill, folder=str(folder))],
        env=environment(tmp_path),
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "swap"
    folder.mkdir()
    program = PROGRAM.format(interrupt="pass", folder=str(folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have it: sums in another order have other bits
    try:
        wanted = losses_of(batches(4))
    finally:
        torch.set_num_threads(threads)
    assert [found["losses"] for found in results([start(program, tmp_path) for _ in range(2)])] == [wanted, wanted]
    assert list(folder.iterdir()) == []


def test_a_budget_that_changes_between_calls(tmp_path: Path) -> None:
    step, _ = made(tmp_path)
    data = batches(6)
    torch.manual_seed(5)
    losses = [step(*data[0]).item()]
    for budget, batch in zip((step.floor, None, 1 << 30, step.floor), data[1:], strict=False):
        step.memory_budget = budget
        losses.append(step(*batch).item())
    step.memory_budget = 4096
    with pytest.raises(BudgetError, match=str(step.floor)):
        step(*data[5])
    step.memory_budget = step.floor
    losses.append(step(*data[5]).item())
    assert losses == losses_of(data)


def test_a_forward_of_the_users_before_the_step(tmp_path: Path) -> None:
    """Its graph needs parameters that the step then changes: torch's own error, as without effcc."""
    step, model = made(tmp_path)
    data = batches(3)
    model.layers[0].requires_grad_(False)
    stepped(step, data[:1])
    model.eval()
    outside = model(data[0][0])
    x = torch.randn(2, 4, 32, requires_grad=True)
    frozen = model.layers[0](x)
    frozen_wanted = torch.autograd.grad(copy.deepcopy(model.layers[0])(x).sum(), x)[0]
    model.train()
    step(*data[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outside.sum().backward()
    frozen.sum().backward()
    assert torch.equal(x.grad, frozen_wanted), "what has not changed gives the right gradient"
    model.zero_grad()
    del outside, frozen
    step(*data[2])
    assert step.held_bytes() < 100_000


def test_a_loss_that_runs_the_model_again(tmp_path: Path) -> None:
    data = batches(3)

    def twice(model: Any) -> Any:
        return lambda outputs, target: loss_of(outputs, target) + 0.1 * model(target).square().mean()

    model = network()
    wanted = ordinary(model, adamw(model.parameters()), data, loss_fn=twice(model))
    other = network()
    step = effcc.train_step(other, adamw(other.parameters()), twice(other), memory_budget="1GiB", swap_dir=tmp_path)
    for budget in ("1GiB", None):
        step.memory_budget = None if budget is None else 1 << 30
    step.memory_budget = 1
    with pytest.raises(BudgetError):
        step(*data[0])
    step.memory_budget = step.floor
    assert stepped(step, data) == wanted and same_values(model, other)


def test_a_loss_that_fails_changes_nothing(tmp_path: Path) -> None:
    broken = [True]

    def loss_fn(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if broken[0]:
            raise ValueError("my own fault")
        return loss_of(outputs, target)

    step, model = made(tmp_path, loss_fn=loss_fn)
    for _ in range(2):
        with pytest.raises(ValueError, match="my own fault"):
            step(*batches(1)[0])
    assert same_values(model, network())
    broken[0] = False
    assert stepped(step, batches(3)) == losses_of(batches(3))
    with pytest.raises(TrainStepError, match="one element"):
        made(tmp_path, loss_fn=lambda outputs, target: outputs)[0](*batches(1)[0])


def test_a_step_within_itself_and_from_another_thread(tmp_path: Path) -> None:
    found: list[BaseException] = []

    def loss_fn(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        def call() -> None:
            try:
                step(*batches(1)[0])
            except TrainStepError as error:
                found.append(error)

        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return loss_of(outputs, target)

    step, _ = made(tmp_path, loss_fn=loss_fn)
    step(*batches(1)[0])
    assert found and all("already running" in str(error) for error in found)


def test_an_interruption_between_updates_is_remembered(tmp_path: Path) -> None:
    step, model = made(tmp_path)
    data = batches(2)
    stepped(step, data[:1])

    def interrupt(parameter: torch.Tensor) -> None:
        if step.updates.updated >= 2:
            raise KeyboardInterrupt

    hook = model.layers[0].up.weight.register_post_accumulate_grad_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(*data[1])
    hook.remove()
    with pytest.raises(TrainStepError, match=r"(?s)KeyboardInterrupt.*load_state_dict"):
        step(*data[1])


def test_state_between_microbatches_is_refused(tmp_path: Path) -> None:
    step, _ = made(tmp_path, accumulate=2)
    step(*batches(1)[0])
    with pytest.raises(TrainStepError, match="between microbatches 1 and 2 of 2"):
        step.state_dict()
    step(*batches(1)[0])
    assert set(step.state_dict()) == {"model", "optimizer"}
