"""Offline capture: a model file's inference or training step as ``ir.Graph``, with no weights allocated.

The path is ``torch.compile``'s: Dynamo traces the model, AOTAutograd functionalizes and differentiates it, its min-cut
partitioner splits forward and backward. Only the backend differs: it keeps the graphs instead of compiling them, and
lets the frame go on with fake values, so that what follows a graph break is captured too.

What lies in the compiled frame: the model, and its loss if the file has a ``loss``; without one, ``.loss`` or the sum
of the outputs is taken outside, as a training loop around ``torch.compile(model)`` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import CaptureError
from ..ir.graph import Graph
from .capture_errors import errors_of_tracing
from .collect import CollectingBackend, GraphBreak
from .inputs import InputSpec, check_inputs, convert, input_specs
from .model_file import ModelSpec, parse_dtype
from .quiet import quiet
from .repeated_modules import RegionReport, inlined_regions, repeated_regions, without_repeated_regions
from .state import StateBytes, model_state, optimizer_name
from .target_device import rewrite_device
from .without_weights import Weightless

__all__ = ["Captured", "CapturedFrame", "GraphBreak", "InputSpec", "capture", "trace"]


@dataclass(frozen=True)
class CapturedFrame:
    """One Dynamo graph. ``dynamo`` is what a plan is matched by; ``forward`` is an inference graph if there is no
    ``backward``. ``names`` maps the graphs' inputs to paths of parameters and buffers."""

    dynamo: Graph
    forward: Graph
    backward: Graph | None
    names: Mapping[str, str]
    #: (forward module, backward module) of another split of the same joint graph -> the frame with that split.
    split_again: Callable[[Any, Any], CapturedFrame] | None = None


@dataclass(frozen=True)
class Captured:
    """What was captured of a model. ``optimizer`` is a key of ``state.OPTIMIZERS``, "" where there is none; ``sizes``
    are the example inputs' values of the graphs' size symbols."""

    name: str
    train: bool
    frames: tuple[CapturedFrame, ...]
    state: StateBytes
    inputs: tuple[InputSpec, ...]
    optimizer: str = ""
    graph_breaks: tuple[GraphBreak, ...] = ()
    notes: tuple[str, ...] = ()
    regions: RegionReport = field(default_factory=RegionReport)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def graphs(self) -> list[Graph]:
        """All graphs in the order in which a step runs them: forwards, then backwards in reverse."""
        forwards = [frame.forward for frame in self.frames]
        return forwards + [frame.backward for frame in reversed(self.frames) if frame.backward is not None]


def capture(
    spec: ModelSpec,
    *,
    train: bool = False,
    optimizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    dynamic: bool | None = None,
    master_weights: bool = False,
    partition: Callable[..., Any] | None = None,
) -> Captured:
    """Capture ``spec``.

    train: forward and backward, with gradients and optimizer state counted; else inference under ``no_grad``.
    optimizer: overrides the file's (see ``state.OPTIMIZERS``). dtype: the model's floating-point parameters and inputs
    are converted to it. device: what the graphs' tensors are said to lie on. dynamic: as in ``torch.compile``.
    partition: splits joint graphs, as AOTAutograd's ``partition_fn``; repeated modules are then traced once, but are
    all written out in the graphs.

    Raises ModelFileError for what is wrong with the file, CaptureError for a model that cannot be traced, OptionError
    for an optimizer that is not known.
    """
    if spec.mlir is not None:
        from .mlir_capture import capture_mlir

        return capture_mlir(spec, train=train, optimizer=optimizer, dtype=dtype, dynamic=dynamic, device=device)
    wanted = optimizer_name(optimizer if optimizer is not None else spec.optimizer) if train else "none"
    traced = trace(
        spec, train=train, dtype=dtype, dynamic=dynamic, share_repeated=partition is None, partition=partition
    )
    state = model_state(traced.backend.model, train=train, optimizer=wanted, master_weights=master_weights)
    return Captured(
        name=spec.name,
        train=train,
        frames=tuple(
            _on_device(CapturedFrame(*frame, _again(frame, remake, device)), device)
            for frame, remake in zip(traced.backend.frames, traced.backend.imports, strict=True)
        ),
        state=state,
        inputs=tuple(input_specs(traced.args, traced.kwargs)),
        optimizer="" if wanted == "none" else wanted,
        graph_breaks=tuple(traced.backend.graph_breaks),
        notes=tuple(_notes(traced.backend.weightless, traced.backend.regions)),
        regions=traced.backend.regions,
        sizes=traced.backend.sizes,
    )


@dataclass(frozen=True)
class Traced:
    """The backend with what it collected, and the (fake) inputs that the model was called with."""

    backend: CollectingBackend
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def trace(
    spec: ModelSpec,
    *,
    train: bool,
    dtype: str | torch.dtype | None = None,
    dynamic: bool | None = None,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    share_repeated: bool = True,
    writes_inputs: bool = True,
    partition: Callable[..., Any] | None = None,
) -> Traced:
    """Build ``spec``'s model without weights and run one step of it through a collecting backend.

    decompositions: None takes Inductor's. share_repeated: the graphs call one body for repeated modules; else these are
    written out, and traced once all the same where there is a ``partition``. writes_inputs: mutated inputs are written
    inside the graphs, not returned first. partition: splits joint graphs; None: torch's minimum cut.
    """
    weightless = Weightless()
    with quiet(), weightless.building():
        model = spec.build_model()
        args, kwargs = spec.example_inputs()
        check_inputs(spec.name, (args, kwargs))
        targets = spec.targets() if spec.targets is not None else ()
        target_dtype = _dtype(dtype)
        if target_dtype is not None:
            model = model.to(target_dtype)
            args, kwargs = convert(args, target_dtype), convert(kwargs, target_dtype)
    model.train(train)
    backend = CollectingBackend(model, weightless, train, decompositions, writes_inputs, partition=partition)
    step = _step(spec, model, targets, backend, dynamic)
    # Where nothing is shared, this thread's frames are ours all the same: what makes their capture cheaper holds.
    apart = without_repeated_regions() if partition is None else inlined_regions()
    way = contextlib.nullcontext() if share_repeated else apart
    with quiet(), errors_of_tracing(spec), repeated_regions(), way, weightless.tracing(), _one_of_a_kind():
        _run(step, args, kwargs, train, spec)
    if not backend.frames:
        raise CaptureError(
            f"nothing of {spec.name} could be captured",
            where="; ".join(f"{item.file}:{item.line} {item.reason}" for item in backend.graph_breaks),
            remedy="Dynamo found no tensor operation that it can trace; see torch.compile's notes on graph breaks.",
        )
    return Traced(backend, args, kwargs)


def _again(
    frame: tuple[Graph, Graph, Graph | None, dict[str, str]],
    remake: Callable[[Any, Any], tuple[Graph, Graph]],
    device: str,
) -> Callable[[Any, Any], CapturedFrame]:
    def split_again(forward: Any, backward: Any) -> CapturedFrame:
        first, second = remake(forward, backward)
        return _on_device(CapturedFrame(frame[0], first, second, frame[3]), device)

    return split_again


def _on_device(frame: CapturedFrame, device: str) -> CapturedFrame:
    if device == "cpu":
        return frame
    backward = None if frame.backward is None else rewrite_device(frame.backward, device)
    return replace(
        frame,
        dynamo=rewrite_device(frame.dynamo, device),
        forward=rewrite_device(frame.forward, device),
        backward=backward,
    )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = parse_dtype(dtype)
    if found is None or not found.is_floating_point:
        raise CaptureError(f"{dtype!r} is not a floating-point dtype", remedy="Use f32, bf16, f16 or f64.")
    return found


def _step(
    spec: ModelSpec, model: torch.nn.Module, targets: tuple[Any, ...], backend: CollectingBackend, dynamic: bool | None
) -> Any:
    """The function of the inputs that yields what ``backward`` is called on."""
    autocast = spec.autocast
    loss = spec.loss

    def with_loss(*args: Any, **kwargs: Any) -> Any:
        assert loss is not None
        return loss(model(*args, **kwargs), *targets)

    entry: Any = model if loss is None else with_loss
    compiled: Any = torch.compile(entry, backend=backend, dynamic=dynamic)
    if autocast is None:
        return compiled

    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=autocast):
            return compiled(*args, **kwargs)

    return under_autocast


@contextlib.contextmanager
def _one_of_a_kind() -> Iterator[None]:
    """Other captures of the same class in this process would count as recompilations of one code object, and sizes that
    differ from theirs would become symbols. What they leave behind is collected with everything else."""
    changes = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20, "automatic_dynamic_shapes": False}
    if hasattr(torch._dynamo.config, "run_gc_after_compile"):
        changes["run_gc_after_compile"] = False
    with torch._dynamo.config.patch(changes):
        yield


def _run(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], train: bool, spec: ModelSpec) -> None:
    with torch.random.fork_rng(devices=[]), torch.enable_grad() if train else torch.no_grad():
        outputs = step(*args, **kwargs)
    if train:
        _check_differentiable(outputs, spec)


def _check_differentiable(outputs: Any, spec: ModelSpec) -> None:
    """Find the loss as a training loop would, and see that it leads back to some parameter."""
    loss = getattr(outputs, "loss", None)
    leaves = [loss] if isinstance(loss, torch.Tensor) else _tensors(outputs)
    if spec.loss is not None and not (isinstance(outputs, torch.Tensor) and outputs.numel() == 1):
        raise CaptureError(
            f"`loss` of {spec.name} returned {_describe(outputs)}, not a scalar tensor",
            remedy="Reduce it, for instance with .mean().",
        )
    if not any(leaf.requires_grad for leaf in leaves):
        raise CaptureError(
            f"no output of {spec.name} depends on a parameter that requires a gradient",
            remedy="Capture it for inference, or give the file a `loss`.",
        )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"an object of class {type(value).__name__}"


def _tensors(tree: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    values = list(tree.values()) if isinstance(tree, Mapping) else tree
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _notes(weightless: Weightless, regions: RegionReport) -> Iterator[str]:
    for device in sorted(weightless.devices):
        yield f"the file places tensors on {device}; they were captured on fake CPU tensors"
    for name, count in regions.calls.items():
        traces = regions.traces.get(name, 1)
        yield f"{name}: {count} calls, traced {'once' if traces == 1 else f'{traces} times'}"
    for rejection in regions.rejections:
        yield f"{rejection.class_name} at {rejection.module} was inlined: {rejection.reason}"
