"""``effcc.train_step`` between its calls: the model in the user's hands, states and checkpoints."""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path
from typing import Any

import effcc
import pytest
import torch
from effcc.errors import OutputError, TrainStepError
from effcc.measuring import peak_of
from some_by_default import some_by_default
from torch import nn
from train_steps import (
    adamw,
    batches,
    floor_of,
    loss_of,
    measured_peak,
    network,
    ordinary,
    same_values,
    state_bytes,
    stepped,
    write_safetensors,
)


def test_between_steps_the_model_is_the_users() -> None:
    model, data = network(), batches(6)
    plain, twin = copy.deepcopy(model), model
    optimizers = adamw(plain.parameters()), adamw(twin.parameters())
    step = effcc.train_step(twin, optimizers[1], loss_of, memory_budget=floor_of(model))

    def both(act: Any) -> None:
        results = [act(plain), act(twin)]
        assert torch.equal(*results)

    for index in range(3):
        ordinary(plain, optimizers[0], data[2 * index : 2 * index + 2])
        stepped(step, data[2 * index : 2 * index + 2])
        both(lambda m: m.eval()(data[0][0]).detach())
        for m in (plain, twin):
            m.train()
            with torch.no_grad():
                m.head.weight.mul_(0.5)
            m.embedding.weight.data.add_(0.25)  # no version counts this
            m.layers[0].up.weight.data = m.layers[0].up.weight.data.flip(0).clone()
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), step.parameters(), strict=True))
    before = step.held_bytes()
    copied = copy.deepcopy(twin)
    assert {type(p) for p in copied.parameters()} == {nn.Parameter} and same_values(copied, plain)
    stream = io.BytesIO()
    torch.save({"model": twin.state_dict(), "optimizer": optimizers[1].state_dict()}, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    assert all(torch.equal(loaded["model"][name], value) for name, value in plain.state_dict().items())
    for index, entry in optimizers[0].state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(loaded["optimizer"]["state"][index][key], value), key
    assert step.held_bytes() <= before + state_bytes(model)
    assert repr(twin.head.weight).startswith("Parameter containing")


@pytest.mark.parametrize("budget", [None, "tight"])
def test_layers_that_are_thawed_and_groups_that_are_added(budget: str | None) -> None:
    def start(model: Any) -> Any:
        model.layers[1].requires_grad_(False)
        return adamw([p for p in model.parameters() if p.requires_grad])

    def thaw(model: Any, optimizer: Any) -> None:
        model.layers[1].requires_grad_(True)
        optimizer.add_param_group({"params": list(model.layers[1].parameters()), "lr": 3e-3})

    data = batches(4)
    plain, twin = network(), network()
    optimizers = start(plain), start(twin)
    memory = None if budget is None else 2 * floor_of(network())
    step = effcc.train_step(twin, optimizers[1], loss_of, memory_budget=memory)
    for change in (False, True):
        if change:
            thaw(plain, optimizers[0])
            thaw(twin, optimizers[1])
        assert stepped(step, data) == ordinary(plain, optimizers[0], data)
    assert same_values(plain, twin)


def test_a_second_step_of_the_same_model_takes_it_over() -> None:
    data = batches(4)
    plain, twin = network(), network()
    floor = floor_of(plain)
    for make in (partial(torch.optim.SGD, lr=0.1, momentum=0.9), adamw):
        step = effcc.train_step(twin, make(twin.parameters()), loss_of, memory_budget=2 * floor)
        assert stepped(step, data) == ordinary(plain, make(plain.parameters()), data)
        assert measured_peak(step, data[0]) <= 2 * floor
        twin.load_state_dict(plain.state_dict())
    without = effcc.train_step(twin, adamw(twin.parameters()), loss_of, swap=False)
    assert stepped(without, data) == ordinary(plain, adamw(plain.parameters()), data)
    assert same_values(plain, twin)


def test_a_gradient_from_outside_is_refused() -> None:
    model = network()
    step = effcc.train_step(model, adamw(model.parameters()), loss_of, memory_budget="1GiB")
    batch = batches(1)[0]
    loss_of(model(batch[0]), batch[1]).backward()
    with pytest.raises(TrainStepError, match="has a gradient before the step begins"):
        step(*batch)
    model.zero_grad()
    step(*batch)


def test_a_state_dict_goes_round() -> None:
    data = batches(6)
    plain = network()
    optimizer = adamw(plain.parameters())
    wanted = ordinary(plain, optimizer, data[:3]) + ordinary(plain, optimizer, data[3:])
    first = network()
    step = effcc.train_step(first, adamw(first.parameters()), loss_of, memory_budget="400KiB")
    losses = stepped(step, data[:3])
    state = copy.deepcopy(step.state_dict())
    second = network()
    second.head.weight.data.zero_()
    other = effcc.train_step(second, adamw(second.parameters()), loss_of, memory_budget="400KiB")
    other.load_state_dict(state)
    losses += stepped(other, data[3:])
    assert losses == wanted and same_values(second, plain)
    with pytest.raises(TrainStepError, match="no 'optimizer'"):
        other.load_state_dict({"model": {}})


@pytest.mark.parametrize(
    "form", some_by_default(["torch", "torch before zip", "safetensors", "folder"], {"torch", "safetensors"})
)
def test_a_meta_model_is_read_from_a_checkpoint(form: str, tmp_path: Path) -> None:
    data = batches(3)
    plain = network(tied=True)
    state = {name: value for name, value in plain.state_dict().items() if name != "head.weight"}
    state["layers.0.up.weight"] = torch.cat([state["layers.0.up.weight"]] * 2)[128:]  # a part of its storage
    path = tmp_path / {"safetensors": "weights.safetensors", "folder": "weights"}.get(form, "weights.pt")
    if form.startswith("torch"):
        torch.save(state, path, _use_new_zipfile_serialization=form == "torch")
    elif form == "safetensors":
        write_safetensors(path, state)
    else:
        path.mkdir()
        names = [*state]
        for part in range(2):
            write_safetensors(path / f"{part}.safetensors", {name: state[name] for name in names[part::2]})
    wanted = ordinary(plain, torch.optim.Adagrad(plain.parameters()), data)
    with torch.device("meta"):
        model = network(tied=True)
    optimizer = torch.optim.Adagrad(model.parameters())
    budget = floor_of(plain, torch.optim.Adagrad)
    step = effcc.train_step(model, optimizer, loss_of, memory_budget=budget, checkpoint=path)
    assert step.held_bytes() < budget / 4
    assert stepped(step, data) == wanted and same_values(model, plain)
    assert model.head.weight is model.embedding.weight


def test_a_model_is_saved_with_one_tensor_in_memory(tmp_path: Path) -> None:
    model, data = network(tied=True, depth=6), batches(2)
    model.register_buffer("count", torch.arange(3))
    step = effcc.train_step(model, adamw(model.parameters()), loss_of, memory_budget=floor_of(model))
    stepped(step, data)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"an older one")
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert peak_of(lambda: step.save_model(path), torch.device("cpu")) <= 3 * largest < state_bytes(model, 1) / 2
    with torch.device("meta"):
        other = network(tied=True, depth=6)
    other.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    effcc.train_step(other, adamw(other.parameters()), loss_of, checkpoint=path)
    assert same_values(model, other) and other.count.tolist() == [0, 1, 2]
    with pytest.raises(OutputError, match="cannot be written"):
        step.save_model(tmp_path / "missing" / "weights.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["weights.safetensors"]


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    def refused(match: str, path: Path | None, **settings: Any) -> None:
        with torch.device("meta"):
            model = network(**settings)
        with pytest.raises(TrainStepError, match=match):
            effcc.train_step(model, adamw(model.parameters()), loss_of, checkpoint=path)

    good = tmp_path / "weights.pt"
    torch.save(network().state_dict(), good)
    refused("no checkpoint is given", None)
    refused(r"layers\.3\.norm\.weight", good, depth=4)
    refused(r"shape \[64, 32\] in the checkpoint", good, words=65)
    refused("No such file", tmp_path / "none.pt")
    for name, content in {
        "bad.pt": b"not a checkpoint",
        "bad.safetensors": b"\x00" * 9,
        "short.safetensors": b"x",
    }.items():
        (tmp_path / name).write_bytes(content)
        refused("cannot be read", tmp_path / name)
    (tmp_path / "empty").mkdir()
    refused("no .safetensors", tmp_path / "empty")


def test_a_saved_step_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    data = batches(6)
    whole, first = network(), network()
    wanted = ordinary(whole, adamw(whole.parameters()), data)
    step = effcc.train_step(first, adamw(first.parameters()), loss_of, memory_budget=floor_of(first))
    losses = stepped(step, data[:3])
    held = step.held_bytes()
    grown = peak_of(lambda: step.save(tmp_path / "step.safetensors"), torch.device("cpu"))
    largest = max(parameter.nbytes for parameter in first.parameters())
    assert grown <= 3 * largest and step.held_bytes() <= held + largest
    torch.manual_seed(1)
    second = network()
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.5)
    other = effcc.train_step(second, optimizer, loss_of, memory_budget=floor_of(first))
    state = torch.get_rng_state()
    other.load(tmp_path / "step.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert optimizer.param_groups[0]["lr"] == 1e-2 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert all(torch.equal(a, b) for a, b in zip(step.parameters(), other.parameters(), strict=True))
    mine, theirs = (each.state_dict()["optimizer"]["state"] for each in (step, other))
    assert all(torch.equal(mine[i][key], theirs[i][key]) for i in mine for key in mine[i])
    del mine, theirs  # what a state_dict holds is in memory
    assert losses == wanted[:3]
    assert stepped(other, data[3:]) == stepped(step, data[3:]) and same_values(second, first)


def test_a_file_of_another_step_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = network()
    step = effcc.train_step(model, adamw(model.parameters()), loss_of, memory_budget=1 << 30)
    step.save(tmp_path / "step.safetensors")
    step.save_model(tmp_path / "weights.safetensors")
    deeper = network(depth=4)
    before = [parameter.clone() for parameter in deeper.parameters()]
    other = effcc.train_step(deeper, adamw(deeper.parameters()), loss_of, memory_budget=1 << 30)
    with pytest.raises(TrainStepError, match="of another training step"):
        other.load(tmp_path / "step.safetensors")
    with pytest.raises(TrainStepError, match="does not hold a training step's state"):
        other.load(tmp_path / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before, deeper.parameters(), strict=True))
    with pytest.raises(OutputError):
        step.save(tmp_path / "missing" / "step.safetensors")
