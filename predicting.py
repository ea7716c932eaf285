"""Whole steps of a model file on devices that need not be at hand: ``effcc predict`` is a shell around it.

On one device the model is captured once, without weights, and that capture is planned for each device as ``effcc plan``
does. On a mesh the transformer's shape is priced by ``cost_model/parallel_training``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .cost_model.devices import Device
from .cost_model.error_band import band_and_flop
from .cost_model.parallel_training.constants import load
from .cost_model.parallel_training.mesh import Mesh
from .cost_model.parallel_training.setup import DTYPES, Training
from .cost_model.parallel_training.shape import TransformerShape, shape_from_config
from .cost_model.parallel_training.step import StepTime, predict_step
from .errors import OptionError
from .plan_capture import capture_model
from .plan_request import PlanRequest
from .planning import Progress, plan_model
from .summary import device_named

if TYPE_CHECKING:
    from .frontend.capture import Captured

#: A configuration whose parameters are further than this from the model's own does not describe it.
_SAME_PARAMETERS = 0.02


@dataclass(frozen=True)
class Prediction:
    """One device's row. Times are seconds, sizes bytes of the fullest device; ``shares`` say what bounds the step."""

    device: str
    devices: int
    seconds: float
    low: float
    high: float
    peak: float
    capacity: float
    fits: bool
    mfu: float
    bound: str
    shares: dict[str, float]
    parts: dict[str, float] = field(default_factory=dict)
    hidden: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    recompute: str = ""
    #: Share of the time that the learned kernel model gave.
    learned: float = 0.0


def predict_devices(
    request: PlanRequest, devices: Sequence[str], progress: Progress = lambda _: nullcontext()
) -> list[Prediction]:
    """A step of ``request.model`` on each device. Raises what ``plan_model`` raises."""
    loaded = {name: device_named(name) for name in devices}
    captures: dict[str, Captured] = {}
    found = []
    for name, device in loaded.items():
        target = "cpu" if device.kind == "cpu" else "cuda"
        asked = replace(request, device=name)
        if target not in captures:
            with progress("capture"):
                captures[target] = capture_model(asked)
        with progress(f"plan for {name}"):
            found.append(_on_one(asked, device, captures[target]))
    return found


def _on_one(request: PlanRequest, device: Device, captured: Captured) -> Prediction:
    planned = plan_model(request, captured=captured)
    summary = planned.summary
    band, flop = band_and_flop(captured.graphs, device, captured.sizes, load().band())
    spent = sum(summary.bounds.values()) or 1.0
    shares = {name: seconds / spent for name, seconds in summary.bounds.items()}
    rate = device.matrix_rate(planned.plan.dtype or "f32")
    peak = summary.peak
    return Prediction(
        device=request.device,
        devices=1,
        seconds=summary.seconds,
        low=summary.seconds * band.low,
        high=summary.seconds * band.high,
        peak=peak,
        capacity=device.memory,
        fits=peak <= device.memory,
        mfu=flop / (summary.seconds * rate) if summary.seconds else 0.0,
        bound=max(shares, key=lambda name: shares[name], default="none"),
        shares=shares,
        memory={name: float(size) for name, size in summary.roles.items()},
        learned=band.learned,
    )


@dataclass(frozen=True)
class MeshRequest:
    """A training step on a mesh. The file's inputs are one microbatch of one data rank; ``recompute``: ``auto`` repeats
    as little as fits."""

    model: str
    mesh: Mesh
    microbatches: int | None = None
    dtype: str | None = None
    recompute: str = "auto"
    interleave: int = 1
    zero: int = 0
    sequence_parallel: bool = True


def predict_mesh(
    request: MeshRequest, devices: Sequence[str], progress: Progress = lambda _: nullcontext()
) -> tuple[TransformerShape, list[Prediction]]:
    """The model's shape, and its step on a mesh of each device.

    Raises OptionError for a model that is no transformer of equal layers, or a mesh that does not divide it;
    DeviceError for a device without the links that the mesh needs.
    """
    loaded = {name: device_named(name) for name in devices}
    with progress("read the model"):
        shape, samples, dtype = model_shape(request.model, request.dtype, progress)
    mesh = request.mesh
    training = Training(
        shape, mesh, samples=samples,
        microbatches=request.microbatches or (4 * mesh.pp if mesh.pp > 1 else 1), interleave=request.interleave,
        zero=request.zero, sequence_parallel=request.sequence_parallel and mesh.tp > 1, dtype=dtype,
        recompute="none" if request.recompute == "auto" else request.recompute,
    )  # fmt: skip
    found = []
    for name, device in loaded.items():
        chosen = training
        made = predict_step(training, device)
        if request.recompute == "auto" and not made.fits:
            chosen = replace(training, recompute="full")
            made = predict_step(chosen, device)
        found.append(_of_mesh(name, chosen, made))
    return shape, found


def _of_mesh(name: str, training: Training, made: StepTime) -> Prediction:
    memory = {part: getattr(made.memory, part) for part in made.memory.__dataclass_fields__}
    return Prediction(
        device=name, devices=training.mesh.ranks, seconds=made.seconds, low=made.low, high=made.high,
        peak=made.memory.total, capacity=made.capacity, fits=made.fits, mfu=made.mfu, bound=made.bound,
        shares=made.shares, parts=made.parts, hidden=made.hidden, memory=memory,
        tokens_per_second=made.tokens_per_second, recompute=training.recompute,
    )  # fmt: skip


def model_shape(
    model: str, dtype: str | None, progress: Progress = lambda _: nullcontext()
) -> tuple[TransformerShape, int, str]:
    """Shape, samples of the example inputs, and dtype of a model file's transformer: from its configuration where it
    has one that agrees with its parameters, else from its captured graph."""
    from .frontend.model_file import load_model_file
    from .frontend.without_weights import Weightless
    from .plan_request import DTYPES as GIVEN

    with Weightless().building():
        spec = load_model_file(model)
        built = spec.build_model()
        inputs = spec.example_inputs()
    parameters = {id(each): each for each in built.parameters()}
    counted = sum(each.numel() for each in parameters.values())
    own = next((str(each.dtype).removeprefix("torch.") for each in parameters.values()), "float32")
    given = dtype.removeprefix("torch.") if dtype else own
    short = GIVEN.get(given, given)
    if short not in DTYPES:
        raise OptionError(f"dtype {given!r} is not trained in", remedy=f"--dtype {' or '.join(DTYPES)}")
    batch = _batch_of(inputs)
    config = getattr(built, "config", None)
    described: Mapping[str, Any] | None = (
        config.to_dict() if config is not None and hasattr(config, "to_dict") else None
    )
    if described is not None and batch is not None:
        try:
            shape = shape_from_config(described, batch[1])
        except OptionError:
            shape = None
        if shape is not None and abs(shape.parameters / counted - 1) <= _SAME_PARAMETERS:
            return shape, batch[0], short
    from .cost_model.parallel_training.derive import shape_of_graph

    with progress("capture"):
        captured = capture_model(PlanRequest(model=model, dtype=dtype, fuse=False))
    shape, samples = shape_of_graph(captured.graphs[0], captured.sizes)
    if abs(shape.parameters / counted - 1) > 10 * _SAME_PARAMETERS:
        raise OptionError(
            f"the model has {counted} parameters, the transformer seen in it {shape.parameters}",
            remedy="meshes are priced for stacks of equal layers with attention, and little beside them",
        )
    return shape, samples, short


def _batch_of(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[int, int] | None:
    """Samples and tokens of the first table of integers among the inputs."""
    import torch
    from torch.utils import _pytree as pytree

    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.dim() == 2 and not leaf.is_floating_point():
            return int(leaf.shape[0]), int(leaf.shape[1])
    return None
