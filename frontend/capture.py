"""Offline capture: a model file's inference or training step as ``ir.Graph``, with no weights allocated.

The path is ``torch.compile``'s: Dynamo traces the model, AOTAutograd functionalizes and differentiates it, its min-cut
partitioner splits forward and backward. Only the backend differs: it keeps the graphs instead of compiling them, and lets
the frame go on with fake values, so that what follows a graph break is captured too.

What lies in the compiled frame: the model, and its loss if the file has a ``loss``; without one, ``.loss`` or the sum of
the outputs is taken outside, as a training loop around ``torch.compile(model)`` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import CaptureError, EffccError
from ..ir.graph import Graph
from ..ir.types import TensorType, TupleType, Type
from .collect import CollectingBackend
from .model_file import ModelSpec, parse_dtype
from .repeated_modules import RegionReport, repeated_regions
from .state import StateBytes, model_state
from .without_weights import Weightless

__all__ = ["CapturedFrame", "Captured", "GraphBreak", "InputSpec", "capture", "rewrite_device"]


@dataclass(frozen=True)
class GraphBreak:
    """Where Dynamo ended a graph early, and why."""

    reason: str
    file: str
    line: int


@dataclass(frozen=True)
class InputSpec:
    """One input tensor of the model as the file gave it (dtype by its short name)."""

    name: str
    type: TensorType | None
    value: object = None


@dataclass(frozen=True)
class CapturedFrame:
    """One Dynamo graph. ``dynamo`` is what a plan is matched by; ``forward`` is an inference graph if there is no
    ``backward``. ``names`` maps the graphs' inputs to paths of parameters and buffers."""

    dynamo: Graph
    forward: Graph
    backward: Graph | None
    names: Mapping[str, str]


@dataclass(frozen=True)
class Captured:
    name: str
    train: bool
    frames: tuple[CapturedFrame, ...]
    state: StateBytes
    inputs: tuple[InputSpec, ...]
    graph_breaks: tuple[GraphBreak, ...] = ()
    notes: tuple[str, ...] = ()
    regions: RegionReport = field(default_factory=RegionReport)

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
) -> Captured:
    """Capture ``spec``.

    train: forward and backward, with gradients and optimizer state counted; else inference under ``no_grad``.
    optimizer: overrides the file's (see ``state.OPTIMIZERS``). dtype: the model's floating-point parameters and inputs
    are converted to it. device: what the graphs' tensors are said to lie on. dynamic: as in ``torch.compile``.

    Raises ModelFileError for what is wrong with the file, CaptureError for a model that cannot be traced.
    """
    weightless = Weightless()
    with weightless.building():
        model = spec.build_model()
        args, kwargs = spec.example_inputs()
        targets = spec.targets() if spec.targets is not None else ()
        target_dtype = _dtype(dtype)
        if target_dtype is not None:
            model = model.to(target_dtype)
            args, kwargs = _convert(args, target_dtype), _convert(kwargs, target_dtype)
    model.train(train)
    backend = CollectingBackend(model, weightless, train)
    step = _step(spec, model, targets, backend, dynamic)
    with repeated_regions() as regions, _recompiling_freely():
        _run(step, args, kwargs, train, spec)
    if not backend.frames:
        raise CaptureError(
            f"nothing of {spec.name} could be captured",
            where="; ".join(f"{item.file}:{item.line} {item.reason}" for item in _breaks(backend)),
            remedy="Dynamo found no tensor operation that it can trace; see torch.compile's notes on graph breaks.",
        )
    frames = tuple(_on_device(frame, device) for frame in (CapturedFrame(*frame) for frame in backend.frames))
    wanted = optimizer if optimizer is not None else spec.optimizer
    return Captured(
        name=spec.name,
        train=train,
        frames=frames,
        state=model_state(model, train=train, optimizer=wanted if train else None, master_weights=master_weights),
        inputs=tuple(_input_specs(args, kwargs)),
        graph_breaks=tuple(_breaks(backend)),
        notes=tuple(_notes(weightless, regions)),
        regions=regions,
    )


def rewrite_device(graph: Graph, device: str) -> Graph:
    """The graph with every value, and every device named as an argument, on ``device``."""

    def on_device(kind: Type | None) -> Type | None:
        if isinstance(kind, TensorType):
            return replace(kind, device=device)
        if isinstance(kind, TupleType):
            return TupleType(tuple(on_device(item) for item in kind.items))  # type: ignore[misc]
        return kind

    nodes = tuple(
        replace(
            node,
            type=on_device(node.type),
            args=_arguments(node.args, device),
            kwargs=tuple((key, _arguments(value, device)) for key, value in node.kwargs),
        )
        for node in graph.nodes
    )
    subgraphs = {name: rewrite_device(body, device) for name, body in graph.subgraphs.items()}
    return graph.with_nodes(nodes, subgraphs=subgraphs)


def _arguments(argument: Any, device: str) -> Any:
    from ..ir.graph import Symbol

    if isinstance(argument, tuple):
        return tuple(_arguments(item, device) for item in argument)
    if isinstance(argument, Symbol) and argument.text.startswith("device("):
        return Symbol(f"device({device})")
    return argument


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


def _convert(tree: Any, dtype: torch.dtype) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, tree
    )


def _step(
    spec: ModelSpec, model: torch.nn.Module, targets: tuple[Any, ...], backend: CollectingBackend, dynamic: bool | None
) -> Callable[..., Any]:
    """The function of the inputs that yields what ``backward`` is called on."""
    autocast = spec.autocast
    loss = spec.loss

    def with_loss(*args: Any, **kwargs: Any) -> Any:
        assert loss is not None
        return loss(model(*args, **kwargs), *targets)

    entry: Any = model if loss is None else with_loss
    compiled = torch.compile(entry, backend=backend, dynamic=dynamic)
    if autocast is None:
        return compiled

    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=autocast):
            return compiled(*args, **kwargs)

    return under_autocast


@contextlib.contextmanager
def _recompiling_freely() -> Iterator[None]:
    """Other captures of the same class in this process count as recompilations of one code object."""
    with torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield


def _run(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], train: bool, spec: ModelSpec) -> None:
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad() if train else torch.no_grad():
            outputs = step(*args, **kwargs)
        if train:
            _check_differentiable(outputs, spec)
    except EffccError:
        raise
    except Exception as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, EffccError):
            raise inner from None
        raise CaptureError(
            f"{spec.name} could not be captured: {type(error).__name__}: {_headline(error)}",
            where=_user_line(error, spec),
            remedy="Run the model once in eager mode: if that works, the reason is Python that depends on data.",
        ) from error


def _headline(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else ""


def _user_line(error: Exception, spec: ModelSpec) -> str:
    import traceback

    own = {str(path) for path in spec.sources}
    real = list(getattr(error, "real_stack", None) or ()) + traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in real if frame.filename in own]
    return f'{frames[-1].filename}:{frames[-1].lineno} "{frames[-1].line}"' if frames else ""


def _check_differentiable(outputs: Any, spec: ModelSpec) -> None:
    """Find the loss as a training loop would, and see that it leads back to some parameter."""
    loss = getattr(outputs, "loss", None)
    leaves = [loss] if isinstance(loss, torch.Tensor) else _tensors(outputs)
    if spec.loss is not None and not (isinstance(outputs, torch.Tensor) and outputs.numel() == 1):
        raise CaptureError(
            f"`loss` of {spec.name} returned {type(outputs).__name__}, not a scalar tensor",
            remedy="Reduce it, for instance with .mean().",
        )
    if not any(leaf.requires_grad for leaf in leaves):
        raise CaptureError(
            f"no output of {spec.name} depends on a parameter that requires a gradient",
            remedy="Capture it for inference, or give the file a `loss`.",
        )


def _tensors(tree: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    values = list(tree.values()) if isinstance(tree, Mapping) else tree
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _breaks(backend: CollectingBackend) -> Iterator[GraphBreak]:
    for reason, file, line in backend.graph_breaks:
        yield GraphBreak(reason, file, line)


def _notes(weightless: Weightless, regions: RegionReport) -> Iterator[str]:
    for device in sorted(weightless.devices):
        yield f"the file places tensors on {device}; they were captured on fake CPU tensors"
    for name, count in regions.calls.items():
        yield f"{name}: {count} calls, traced {regions.traces.get(name, 1)} times"
    for rejection in regions.rejections:
        yield f"{rejection.class_name} at {rejection.module} was inlined: {rejection.reason}"


def _input_specs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[InputSpec]:
    from torch.utils._pytree import keystr, tree_leaves_with_path

    from .fx_import import value_type

    for path, leaf in tree_leaves_with_path((args, kwargs)):
        name = keystr(path[1:])
        if isinstance(leaf, torch.Tensor):
            found = value_type(leaf)
            yield InputSpec(name, found if isinstance(found, TensorType) else None)
        else:
            yield InputSpec(name, None, leaf)

