"""Measures a model compiled with a plan: the allocator's peak and the median time of a step."""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import DeviceError, EffccError, ModelFileError, PlanError
from .formatting import bytes_text
from .summary import device_of

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
    #: Bytes held at equal distances over a step; empty where the device's allocator keeps no record of it.
    memory: tuple[int, ...] = ()


#: Points of the curve of memory over a step.
POINTS = 400


def measure(
    path: Path | None,
    plan: Plan,
    model_file: str,
    *,
    rounds: int,
    seed: int,
    progress: Callable[[str], AbstractContextManager[None]],
    trace: Callable[[list[dict[str, Any]]], None] | None = None,
) -> Measured:
    """Build the model with random weights, compile it with the plan at ``path`` and measure steps of it. ``trace`` is
    given the trace events of one more step.

    Raises:
        ModelFileError: the file is at fault, or the model fails while it runs.
        PlanError: the model is not the plan's. DeviceError: it needs more memory than there is here.
    """
    from .runtime.reports import reports, reset

    device = _device_for(plan)
    _check_room(plan, device)
    reset()
    with progress("build the model"):
        step, held = training_step(plan, path, model_file, device, seed) if plan.training else forward_step(
            plan, path, model_file, device, seed
        )  # fmt: skip
    with progress("compile"), _faults_of(model_file):
        step()
        step()
    with progress("measure memory"):
        before, (extra, curve) = held(), memory_of(step, device)
    times = []
    with progress(f"time {rounds} rounds"):
        for _ in range(rounds):
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    if trace is not None:
        with progress("trace a step"):
            trace(trace_of(step))
    rows = [f"{row.op}: {row.reason} ({row.source})" for report in reports() for row in report.fallbacks]
    fallbacks = tuple(dict.fromkeys(rows))
    memory = tuple(before + change for change in curve)
    return Measured(statistics.median(times), tuple(times), before + extra, before, device.type, fallbacks, memory)


Step = Callable[[], Any]

#: Names of ``frontend.state.OPTIMIZERS`` that are a class of torch.optim with keywords.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"lr": 1e-3}),
    "sgd_momentum": ("sgd", {"lr": 1e-3, "momentum": 0.9}),
    "adamw_amsgrad": ("adamw", {"amsgrad": True}),
}


def _device_for(plan: Plan) -> torch.device:
    """CUDA for a plan made for anything but a CPU, where there is a CUDA device."""
    planned = device_of(plan)
    on_cpu = planned.kind == "cpu" if planned is not None else plan.device == "cpu"
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")


def _check_room(plan: Plan, device: torch.device) -> None:
    """Refuse what cannot fit: the system would end the process, without a word."""
    import psutil

    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = psutil.virtual_memory().total
    peak = plan.peak.get("device", 0)
    if peak > there:
        raise DeviceError(
            f"the plan needs {bytes_text(peak)}, and this machine's {device.type} has {bytes_text(there)}",
            remedy="plan a smaller batch or a narrower --dtype, or run it on a larger machine",
        )


@contextlib.contextmanager
def _faults_of(model_file: str) -> Iterator[None]:
    """What the model raises while it runs, as an error that names the user's line."""
    try:
        yield
    except EffccError:
        raise
    except Exception as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, EffccError):
            raise inner from None
        own = str(Path(model_file.rpartition(".py")[0] + ".py").absolute())
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
        headline = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ModelFileError(
            f"the model failed while it ran: {type(error).__name__}: {headline}",
            where=f'{own}:{frames[-1].lineno} "{frames[-1].line}"' if frames else own,
            remedy="see whether it runs without effcc: call it in eager mode",
        ) from error


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

    options: dict[str, Any] = {"plan": str(path)} if path is not None else {}
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
        loss_of(outputs).backward()  # type: ignore[no-untyped-call]
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
    """The plan's optimizer: the model file's function where it makes that one, else torch.optim's class; None if the
    plan has none. Raises EffccError for one that torch.optim does not have."""
    from .frontend.state import optimizer_name

    if not name:
        return None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if callable(spec.optimizer) and not isinstance(spec.optimizer, type) and optimizer_name(spec.optimizer) == name:
        made: torch.optim.Optimizer = spec.optimizer(parameters)
        return made
    base, keywords = _VARIANTS.get(name, (name, {}))
    table = {each.lower(): each for each in dir(torch.optim) if isinstance(getattr(torch.optim, each), type)}
    if base not in table:
        raise EffccError(f"optimizer {name!r} is not in torch.optim", remedy="make the plan with one that is")
    cls: Any = getattr(torch.optim, table[base])
    found: torch.optim.Optimizer = cls(parameters, **keywords)
    return found


def _autocast(spec: Any, device: torch.device) -> Any:
    if spec.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=spec.autocast)


def peak_of(step: Step, device: torch.device) -> int:
    """The most bytes that a step holds beyond what was held before it, by the allocator's own record."""
    return memory_of(step, device)[0]


def memory_of(step: Step, device: torch.device) -> tuple[int, tuple[int, ...]]:
    """``peak_of``, and what is held beyond at equal distances over the step (on a CPU; elsewhere nothing)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before), ()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = step()
    del kept
    from .torch_internals import memory_timeline

    running = highest = 0
    history: list[tuple[float, int]] = []
    for moment, change in memory_timeline(profile):
        running += change
        highest = max(highest, running)
        history.append((moment, running))
    return highest, _sampled(history)


def _sampled(history: list[tuple[float, int]]) -> tuple[int, ...]:
    """The most that was held in each of ``POINTS`` equal spans of time."""
    if not history:
        return ()
    length = history[-1][0] or 1.0
    curve = [0] * POINTS
    held, reached = 0, 0
    for moment, size in history:
        index = min(int(moment / length * POINTS), POINTS - 1)
        for between in range(reached + 1, index + 1):
            curve[between] = held
        curve[index] = max(curve[index], size)
        held, reached = size, index
    return tuple(curve)


def trace_of(step: Step) -> list[dict[str, Any]]:
    """Trace events of one step, as torch's profiler records them."""
    import json
    import tempfile

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events
