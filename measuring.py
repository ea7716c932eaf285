"""Measures a model compiled with a plan: the allocator's peak and the median time of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import EffccError, PlanError

if TYPE_CHECKING:
    from .ir.plan import Plan


@dataclass(frozen=True)
class Measured:
    """``seconds``: median of the rounds. ``peak``: bytes the allocator held at most during a step, with everything that
    was there before it (parameters, gradients, optimizer state, inputs)."""

    seconds: float
    all_seconds: tuple[float, ...]
    peak: int
    held_before: int
    device: str
    fallbacks: tuple[str, ...] = ()


def measure(
    path: Path | None,
    plan: Plan,
    model_file: str,
    *,
    rounds: int,
    seed: int,
    progress: Callable[[str], AbstractContextManager[None]],
) -> Measured:
    """Build the model with random weights, compile it with the plan at ``path`` and measure steps of it.

    Raises ModelFileError, and PlanError when the model is not the plan's.
    """
    from .runtime.reports import reports, reset

    device = torch.device("cuda" if torch.cuda.is_available() and plan.device != "cpu" else "cpu")
    reset()
    with progress("build the model"):
        step, held = training_step(plan, path, model_file, device, seed) if plan.training else forward_step(
            plan, path, model_file, device, seed
        )  # fmt: skip
    with progress("compile"):
        step()
        step()
    with progress("measure memory"):
        before, extra = held(), peak_of(step, device)
    times = []
    with progress(f"time {rounds} rounds"):
        for _ in range(rounds):
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    rows = [f"{row.op}: {row.reason} ({row.source})" for report in reports() for row in report.fallbacks]
    fallbacks = tuple(dict.fromkeys(rows))
    return Measured(statistics.median(times), tuple(times), before + extra, before, device.type, fallbacks)


Step = Callable[[], Any]


def _load(model_file: str, device: torch.device, dtype: str, seed: int) -> tuple[Any, torch.nn.Module, Any, Any, Any]:
    from .frontend.model_file import load_model_file, parse_dtype

    torch.manual_seed(seed)
    spec = load_model_file(model_file)
    model = spec.build_model()
    args, kwargs = spec.example_inputs()
    targets = spec.targets() if spec.targets is not None else ()
    wanted = parse_dtype(dtype) if dtype else None

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, wanted if wanted is not None and value.is_floating_point() else None)

    from torch.utils._pytree import tree_map

    model = model.to(device)
    own = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if wanted is not None and own - {wanted}:
        model = model.to(wanted)
    return spec, model, tree_map(move, args), tree_map(move, kwargs), tree_map(move, targets)


def _compiled(spec: Any, model: torch.nn.Module, targets: Any, path: Path | None) -> Callable[..., Any]:
    """The same frame that ``frontend.capture`` captured: the model, and the file's loss if there is one."""

    def with_loss(*args: Any, **kwargs: Any) -> Any:
        return spec.loss(model(*args, **kwargs), *targets)

    options = {"plan": str(path)} if path is not None else {}
    entry: Any = model if spec.loss is None else with_loss
    compiled: Callable[..., Any] = torch.compile(entry, backend="effcc", options=options)
    return compiled


def _tensor_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages among ``tensors``."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _tensors(tree: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def forward_step(
    plan: Plan, path: Path | None, model_file: str, device: torch.device, seed: int
) -> tuple[Step, Callable[[], int]]:
    """A forward pass without gradients, and the bytes held between passes."""
    spec, model, args, kwargs, targets = _load(model_file, device, plan.dtype, seed)
    model.eval()
    compiled = _compiled(spec, model, targets, path)

    def step() -> Any:
        with torch.no_grad(), _autocast(spec, device):
            return compiled(*args, **kwargs)

    own = [*model.parameters(), *model.buffers(), *_tensors((args, kwargs, targets))]
    return step, lambda: _tensor_bytes(own)


def training_step(
    plan: Plan, path: Path | None, model_file: str, device: torch.device, seed: int
) -> tuple[Step, Callable[[], int]]:
    """Forward, backward and optimizer; gradients are freed before the next step's forward, as ``zero_grad`` does."""
    spec, model, args, kwargs, targets = _load(model_file, device, plan.dtype, seed)
    model.train()
    optimizer = make_optimizer(plan.optimizer, spec, model)
    compiled = _compiled(spec, model, targets, path)

    def step() -> None:
        with _autocast(spec, device):
            outputs = compiled(*args, **kwargs)
        loss_of(outputs).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    def held() -> int:
        state = [value for entry in optimizer.state.values() for value in _tensors(entry)] if optimizer else []
        own = [*model.parameters(), *model.buffers(), *_tensors((args, kwargs, targets)), *state]
        return _tensor_bytes(own)

    return step, held


def loss_of(outputs: Any) -> torch.Tensor:
    """The scalar a training loop would differentiate: the loss, or the sum of what carries a gradient."""
    loss = getattr(outputs, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    if isinstance(outputs, torch.Tensor) and outputs.numel() == 1:
        return outputs
    leaves = [leaf for leaf in _tensors(outputs) if leaf.requires_grad]
    if not leaves:
        raise PlanError("no output depends on a parameter", remedy="give the model file a loss")
    total = leaves[0].sum()
    for leaf in leaves[1:]:
        total = total + leaf.sum()
    return total


def make_optimizer(name: str, spec: Any, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    """The plan's optimizer from torch.optim; None if the plan has none."""
    if not name or name == "none":
        return None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if callable(spec.optimizer) and not isinstance(spec.optimizer, type):
        made: torch.optim.Optimizer = spec.optimizer(parameters)
        return made
    table = {each.lower(): each for each in dir(torch.optim) if isinstance(getattr(torch.optim, each), type)}
    base, keywords = {
        "sgd_momentum": ("sgd", {"momentum": 0.9}),
        "adamw_amsgrad": ("adamw", {"amsgrad": True}),
    }.get(name, (name.replace("_", ""), {}))
    if base not in table:
        raise EffccError(f"optimizer {name!r} is not in torch.optim", remedy="make the plan with one that is")
    cls: Any = getattr(torch.optim, table[base])
    return cls(parameters, **({"lr": 1e-3} if base == "sgd" else {}), **keywords)  # type: ignore[no-any-return]


def _autocast(spec: Any, device: torch.device) -> Any:
    import contextlib

    if spec.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=spec.autocast)


def peak_of(step: Step, device: torch.device) -> int:
    """The most bytes that a step holds beyond what was held before it, by the allocator's own record."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = step()
    del kept
    from .torch_internals import memory_events

    running = highest = 0
    for change in memory_events(profile):
        running += change
        highest = max(highest, running)
    return highest
