"""``effcc.train_step``: the ordinary loop's results, bit for bit, within a budget that the allocator confirms."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import effcc
import pytest
import torch
from effcc.errors import BudgetError, OptionError, TrainStepError
from fresh_seed import fresh_random
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
    pair,
    same_values,
    state_bytes,
    stepped,
)

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adamw amsgrad": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "rprop": partial(torch.optim.Rprop, lr=1e-2),
    "asgd": partial(torch.optim.ASGD, lr=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-2, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", some_by_default(OPTIMIZERS, {"adamw amsgrad", "adafactor"}))
def test_every_optimizer_gives_the_same_bits_at_the_least_memory(name: str) -> None:
    make, data = OPTIMIZERS[name], batches(4)
    model = network()
    plain, optimizer = pair(model, make)
    wanted = ordinary(plain, optimizer, data)
    twin, optimizer = pair(model, make)
    step = effcc.train_step(twin, optimizer, loss_of, memory_budget=floor_of(model, make))
    assert stepped(step, data) == wanted
    assert same_values(twin, plain)
    assert all(p.grad is None for p in twin.parameters())


def test_threads_that_keep_their_arguments_change_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    usual, kept = floor_of(model), []

    class Keeping(ThreadPoolExecutor):
        """A thread of the usual pool may be late to let go of what it was given; here it never does."""

        def submit(self, *given: Any) -> Any:
            kept.append(given)
            return super().submit(*given)

    monkeypatch.setattr("effcc.runtime.train_step.stores.ThreadPoolExecutor", Keeping)
    assert floor_of(model) == usual
    assert kept


def test_when_python_collects_changes_no_floor() -> None:
    class Ring:
        def __init__(self, held: torch.Tensor) -> None:
            self.held, self.itself = held, self

    def loss_with_rings(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            Ring(torch.empty(50_000))
        return loss_of(outputs, target)

    def floor() -> int:
        twin, optimizer = pair(network(), adamw)
        step = effcc.train_step(twin, optimizer, loss_with_rings, memory_budget=1 << 30)
        step(*batches(1)[0])
        assert step.floor is not None
        return step.floor

    usual, thresholds = floor(), gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        assert floor() == usual
    finally:
        gc.set_threshold(*thresholds)


def test_budgets_are_kept_by_the_allocator() -> None:
    random = fresh_random()
    model, data = network(depth=6), batches(4)
    plain, optimizer = pair(model, adamw)
    wanted = ordinary(plain, optimizer, data)
    floor = floor_of(model)
    assert 3 * floor < state_bytes(model), "weights, gradients and optimizer exceed it three times over"
    held = []
    for budget in (floor, *sorted(random.randrange(floor, 2 * state_bytes(model)) for _ in range(5)), 1 << 30):
        twin, optimizer = pair(model, adamw)
        step = effcc.train_step(twin, optimizer, loss_of, memory_budget=budget)
        assert stepped(step, data) == wanted
        assert same_values(twin, plain), budget
        assert measured_peak(step, data[0]) <= budget
        held.append(step.held_bytes())
    assert held[-1] >= state_bytes(model, copies=3), "all of it, where there is room"


@pytest.mark.parametrize("swap", [True, False])
def test_without_a_budget_or_without_swap(swap: bool) -> None:
    model, data = network(), batches(3)
    plain, optimizer = pair(model, adamw)
    wanted = ordinary(plain, optimizer, data)
    for budget in (None, "1GiB", floor_of(model, swap=swap)):
        twin, optimizer = pair(model, adamw)
        step = effcc.train_step(twin, optimizer, loss_of, memory_budget=budget, swap=swap)
        assert stepped(step, data) == wanted
        assert same_values(twin, plain)
        if isinstance(budget, int):
            assert measured_peak(step, data[0]) <= budget


def test_gradients_never_exist_all_at_once() -> None:
    model = network(depth=6)
    floor = floor_of(model, partial(torch.optim.SGD, lr=0.1), swap=False)
    assert floor < state_bytes(model, copies=2), "parameters, and less than all gradients"


@pytest.mark.parametrize("accumulate", some_by_default([1, 3], {3}))
@pytest.mark.parametrize("clip", ["norm", "value", "none"])
def test_clipping_and_accumulation(clip: str, accumulate: int) -> None:
    model, data = network(), batches(6)
    clipped = {
        "norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1),
        "value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01),
        "none": lambda m: None,
    }[clip]
    chosen = {"norm": {"clip_grad_norm": 0.1}, "value": {"clip_grad_value": 0.01}, "none": {}}[clip]
    plain, optimizer = pair(model, adamw)
    wanted = ordinary(plain, optimizer, data, clip=clipped, accumulate=accumulate)
    floor = floor_of(model, accumulate=accumulate, **chosen)
    twin, optimizer = pair(model, adamw)
    step = effcc.train_step(twin, optimizer, loss_of, memory_budget=floor, accumulate=accumulate, **chosen)
    assert stepped(step, data) == wanted
    assert same_values(twin, plain)
    for batch in data[:accumulate]:
        assert measured_peak(step, batch) <= floor


def test_param_groups_schedulers_and_implementations_for_many_at_once() -> None:
    data = batches(5)

    def train(kind: str) -> tuple[nn.Module, list[float], Any]:
        model = network()
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 3e-3}]
        fused: dict[str, Any] = {"foreach": True} if kind == "foreach" else {}
        optimizer = torch.optim.AdamW(groups, lr=1e-2, **fused)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 3e-3], total_steps=9)
        if kind == "ordinary":
            return model, ordinary(model, optimizer, data, scheduler=scheduler), optimizer
        step = effcc.train_step(model, optimizer, loss_of, memory_budget="600KiB")
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        torch.manual_seed(5)
        losses = []
        for batch in data:
            losses.append(step(*batch).item())
            scheduler.step()
        assert len(calls) == len(data), "the user's hooks run once a step"
        return model, losses, optimizer

    plain, wanted, _ = train("ordinary")
    for kind in ("plain", "foreach"):
        model, losses, optimizer = train(kind)
        assert losses == wanted and same_values(model, plain), kind
        assert optimizer.param_groups[0].get("foreach") == (True if kind == "foreach" else None)


@pytest.mark.parametrize("change", ["tied", "frozen", "batch norm", "used elsewhere", "shared layer", "wide norms"])
def test_models_with_peculiarities(change: str) -> None:
    class Elsewhere(nn.Module):
        """Layers that read parameters of others, one of them without a gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.base = network()
            for layer in self.base.layers[:2]:
                layer.forward = partial(self._layer, layer)

        def _layer(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
            last = self.base.layers[2]
            y = type(layer).forward(layer, x) + 0.1 * last.up.weight.detach().mean()
            return y + 0.1 * torch.tanh(x @ self.base.layers[0].up.weight.t()[:, :32])

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.base(tokens) + self.base.layers[1].down.weight.sum()

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = network()
            parts = (nn.Sequential(nn.Conv1d(32, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU()) for _ in range(3))
            self.parts = nn.Sequential(*parts)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.base.embedding(tokens).transpose(1, 2)
            return self.base.head(self.parts(x).transpose(1, 2))

    torch.manual_seed(0)
    model: nn.Module = {"batch norm": Normed, "used elsewhere": Elsewhere}.get(change, network)()
    if change == "tied":
        model = network(tied=True)
    if change == "wide norms":
        model = network(width=512, depth=2, words=16)  # so that one operation needs two that were away
    if change == "frozen":
        model.embedding.requires_grad_(False)
        model.layers[1].requires_grad_(False)
    if change == "shared layer":
        model.layers[2] = model.layers[0]
    if change == "used elsewhere":
        model = Elsewhere()  # its layers are bound to itself: it is built anew, not copied
    make = lambda m: adamw([p for p in m.parameters() if p.requires_grad])  # noqa: E731
    data = batches(4, words=16)

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return Elsewhere() if change == "used elsewhere" else copy.deepcopy(model)

    plain, twin = fresh(), fresh()
    wanted = ordinary(plain, make(plain), data)
    step = effcc.train_step(twin, make(twin), loss_of, memory_budget=1 << 30)
    step.memory_budget = 1
    with pytest.raises(BudgetError):
        step(*data[0])
    step.memory_budget = step.floor
    losses = stepped(step, data)
    if change == "used elsewhere":  # three blocks add to one gradient: each adds up its own part first
        assert losses == pytest.approx(wanted, rel=1e-5)
    else:
        assert losses == wanted and same_values(twin, plain)
    assert measured_peak(step, data[0]) <= step.floor


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize(
    ("part", "backend"),
    [
        ("layers", "aot_eager"),
        pytest.param("layers", "effcc", marks=pytest.mark.slow),
        pytest.param("layers in place", "effcc", marks=pytest.mark.slow),
        pytest.param("model", "effcc", marks=pytest.mark.slow),
    ],
)
def test_compiled_modules(part: str, backend: str) -> None:
    def compiled(model: Any) -> Any:
        if part == "model":
            return torch.compile(model, backend=backend)
        for index, layer in enumerate(model.layers):
            if part == "layers":
                model.layers[index] = torch.compile(layer, backend=backend)
            else:
                layer.compile(backend=backend)
        return model

    data = batches(4)
    plain, twin = network(), network()
    run = compiled(plain)
    optimizer = adamw(plain.parameters())
    wanted = ordinary(run, optimizer, data[:3])
    torch._dynamo.reset()
    run_twin = compiled(twin)
    step = effcc.train_step(run_twin, adamw(twin.parameters()), loss_of, memory_budget="1GiB")
    step.memory_budget = 1
    with pytest.raises(BudgetError):
        step(*data[0])
    step.memory_budget = step.floor
    assert stepped(step, data[:3]) == wanted and same_values(plain, twin)
    assert len(step.spending.replayed) == (0 if part == "model" else 3) and step.notes == []
    with torch.no_grad():  # outside of a step, too
        assert torch.equal(run_twin.eval()(data[3][0]), run.eval()(data[3][0]))
    run_twin.train()
    assert measured_peak(step, data[0]) <= step.floor


def test_a_block_that_keeps_a_cache_is_not_run_again() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = network()
            self.calls = 0
            self.base.layers[1].register_forward_pre_hook(lambda *_: None)
            old = self.base.layers[1].up.forward

            def counted(x: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                return old(x) * (1 + self.calls % 2)

            self.base.layers[1].up.forward = counted

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.base(tokens)

    torch.manual_seed(0)
    model = Counting()
    step = effcc.train_step(model, adamw(model.parameters()), loss_of, memory_budget="1GiB")
    step(*batches(1)[0])
    assert step.blocks == [] and any("differ when it runs again" in note for note in step.notes)


def test_buffers_that_are_replaced_are_replaced_once_a_step() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = network()
            self.register_buffer("seen", torch.zeros(()))
            for layer in self.base.layers:
                layer.register_buffer("seen", torch.zeros(()))
                layer.register_forward_hook(self._count)
                layer.up.register_buffer("seen", torch.zeros(()))
                layer.up.register_forward_hook(self._count)

        @staticmethod
        def _count(module: nn.Module, *_: Any) -> None:
            module.seen = module.seen + 1

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            self._count(self)
            return self.base(tokens) * (1 + 0.1 * self.seen)

    torch.manual_seed(0)
    model = Counting()
    data = batches(3)
    plain, optimizer = pair(model, adamw)
    wanted = ordinary(plain, optimizer, data)
    twin, optimizer = pair(model, adamw)
    step = effcc.train_step(twin, optimizer, loss_of, memory_budget=floor_of(model))
    assert stepped(step, data) == wanted and same_values(plain, twin)
    assert len(step.spending.replayed) == 3


def test_what_cannot_be_applied_one_by_one_is_refused() -> None:
    model = network()

    class Joint(torch.optim.Optimizer):
        """Scales every gradient by the norm of all."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in held]).norm()
            for p in held:
                p.sub_(0.1 * p.grad / norm)

    cases: list[tuple[Any, str]] = [
        (torch.optim.LBFGS(model.parameters()), "LBFGS.*evaluates the loss again"),
        (torch.optim.SparseAdam(model.parameters()), "SparseAdam.*sparse"),
        (Joint(model.parameters()), "depends on the others"),
        (torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), differentiable=True), "differentiable"),
        ("adam", "not a torch.optim.Optimizer"),
    ]
    for optimizer, match in cases:
        with pytest.raises(TrainStepError, match=match):
            effcc.train_step(model, optimizer, loss_of)
    for settings in ({"accumulate": 0}, {"clip_grad_norm": -1.0}, {"clip_grad_norm": 1.0, "clip_grad_value": 1.0}):
        with pytest.raises(OptionError):
            effcc.train_step(model, adamw(model.parameters()), loss_of, **settings)
    model.head.weight = nn.Parameter(model.embedding.weight.data)
    with pytest.raises(TrainStepError, match="share memory"):
        effcc.train_step(model, adamw(model.parameters()), loss_of)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "resnet", "mixtral", "t5"])
def test_real_models(name: str) -> None:
    import models

    sample = models.build(name, "tiny")
    data = [(sample.inputs, sample.target)] * 3
    plain, optimizer = pair(sample.model, adamw)
    wanted = ordinary(plain, optimizer, data, loss_fn=models.loss_of)
    twin, optimizer = pair(sample.model, adamw)
    step = effcc.train_step(twin, optimizer, models.loss_of, memory_budget="1GiB")
    step.memory_budget = 1
    with pytest.raises(BudgetError):
        step(*data[0])
    step.memory_budget = step.floor
    assert stepped(step, data) == wanted
    assert same_values(twin, plain)
    assert measured_peak(step, data[0]) <= step.floor
