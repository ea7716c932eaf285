"""Time of one training step on a mesh, broken down by what it is spent on.

Each stage's forward and backward of a microbatch is the time of its kernels and of the communication that nothing hides
(``wall``: the host that launches them may be what is waited for). A pipeline of p ranks with v stages each and m
microbatches then takes ``m·w + (sum of all ranks' w - w) / v`` with w the slowest rank's time of a microbatch
(Narayanan et al., Efficient large-scale language model training, 2021): what exceeds ``m·w`` is its bubble.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..devices import Device
from .communication import Communication
from .constants import Calibration, Constants, load
from .memory import StepMemory, layers_of_stage, rank_parameters, step_memory
from .seconds import PassTime, wall, work_time
from .setup import Training
from .work import (
    Work,
    attention_core,
    backward,
    embedding_backward,
    embedding_forward,
    head_backward,
    head_forward,
    layer_forward,
    sharded_copies,
)

#: Units that a collective between the GPUs of a node takes, one for each channel. An assumption: NCCL chooses the
#: number, and its documentation of NCCL_MAX_CTAS gives only the most that it may be.
CHANNELS = 20
#: Bytes that an optimizer step moves for each parameter besides its state: the gradient is copied to f32, unscaled,
#: measured, clipped and read; master weights are read and written; the weights are written; gradients are zeroed.
_UPDATE_BYTES = 34
#: Kernels of the host's for each pass over a rank's parameters.
_UPDATE_LAUNCHES = 40


@dataclass(frozen=True)
class StepTime:
    """A predicted step. All times are seconds; ``parts`` of the slowest rank add up to ``seconds``."""

    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    #: Communication that runs beside kernels.
    hidden: dict[str, float]
    memory: StepMemory
    capacity: float
    mfu: float
    hfu: float
    tokens_per_second: float
    bound: str
    #: Bound -> share of the step.
    shares: dict[str, float]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity


@dataclass(frozen=True)
class _Pass:
    """One rank's forward, repeated forward and backward of a microbatch: kernels, and exposed communication."""

    forward: PassTime
    recompute: PassTime
    backward: PassTime
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    hidden: float = 0.0


def predict_step(training: Training, device: Device, calibration: Calibration | None = None) -> StepTime:
    """Predict a training step. Raises DeviceError where the mesh needs a link that the device file lacks."""
    calibration = calibration or load()
    constants = calibration.constants
    communication = Communication(training, device, constants)
    mesh = training.mesh
    stages = _distinct_stages(training)
    passes = {stage: _stage_pass(training, stage, device, constants, communication) for stage in stages}
    walls = {stage: _pass_seconds(each, constants, mesh.tp) for stage, each in passes.items()}
    slowest = max(stages, key=lambda stage: walls[stage])
    counted = {stage: _times(training, stage, stages) for stage in stages}
    every = sum(walls[stage] * count for stage, count in counted.items())
    count, chunks = training.microbatches, training.interleave
    one = communication.transfer()
    transfers = 2.0 * one * ((count * chunks if mesh.pp > 1 else 0) + mesh.pp - 1)
    bubble = (every - walls[slowest]) / chunks
    busy = count * walls[slowest]
    sharded, sharded_hidden = _parameter_gathers(training, slowest, communication, walls[slowest])
    kernels = passes[slowest].forward + passes[slowest].recompute + passes[slowest].backward
    slowed = sharded_hidden * slowdown(device) * kernels.compute / max(kernels.device, 1e-12)
    data, data_hidden = _gradient_seconds(training, communication, walls)
    optimizer = max(_optimizer(training, stage, device, constants) for stage in stages)
    seconds = busy + bubble + transfers + sharded + slowed + data + optimizer + constants.step
    parts = _parts(passes[slowest], walls[slowest], count)
    parts |= {"pipeline": transfers, "data": data + sharded + slowed, "bubble": bubble, "optimizer": optimizer}
    parts["step"] = constants.step
    hidden = {"tensor": passes[slowest].hidden * count, "data": data_hidden + sharded_hidden}
    return _summary(training, device, calibration, seconds, parts, hidden, passes[slowest])


def _stage_pass(
    training: Training, stage: int, device: Device, constants: Constants, communication: Communication
) -> _Pass:
    """What one rank does for a microbatch."""
    mesh = training.mesh
    layers = layers_of_stage(training, stage)

    def seconds(works: list[Work]) -> PassTime:
        return work_time(works, training.dtype, device, constants)

    works = layer_forward(training)
    own = rank_parameters(training, stage) / max(1, layers)
    accumulated = 0.0 if training.fused_accumulation else own * (training.element + 2 * training.gradient)
    ahead, back = seconds(works), seconds(backward(works, accumulated))
    again = PassTime()
    if training.recompute == "full":
        again = ahead
    elif training.recompute == "selective" and not training.fused_attention:
        again = seconds(attention_core(training))
    sums = communication.tensor_layer()
    calls = (4 if training.sequence_parallel else 2) if mesh.tp > 1 else 0
    repeated = sums if training.recompute == "full" else 0.0
    gathered = communication.tensor_gather()
    products = [work for work in works if work.kind == "product"]
    weights = seconds(products).compute
    # what is gathered for the weights' gradients comes beside the inputs' gradients; the inputs' gradients are summed
    # beside the weights' gradients of the products that split columns
    hidden = min(sums / (2 if training.sequence_parallel else 1), weights * _column_share(training))
    hidden = hidden if training.asynchronous_sums else 0.0
    exposed = 2 * sums + repeated - hidden + max(0.0, gathered - weights)
    context = communication.context_layer() * 3
    around = max(0.0, context - 3 * ahead.compute / 4) if context else 0.0
    expert = communication.expert_layer() * (3 if training.recompute == "full" else 2)
    forward, recompute, backward_ = ahead * layers, again * layers, back * layers
    tensor = exposed * layers
    collectives = calls * layers
    if stage == 0:
        forward = forward + seconds(embedding_forward(training))
        backward_ = backward_ + seconds(embedding_backward(training))
    if stage == mesh.pp - 1:
        forward = forward + seconds(head_forward(training))
        backward_ = backward_ + seconds(head_backward(training))
        tensor += communication.head() if mesh.tp > 1 else 0.0
    backward_ = backward_ + seconds(sharded_copies(training, rank_parameters(training, stage)))
    hop = PassTime(collectives=2 * training.interleave if mesh.pp > 1 else 0)
    return _Pass(
        forward + PassTime(collectives=collectives) + hop,
        recompute + PassTime(collectives=collectives if repeated else 0),
        backward_ + PassTime(collectives=collectives) + hop,
        tensor,
        around * layers,
        expert * layers,
        (hidden + min(gathered, weights)) * layers,
    )


def _column_share(training: Training) -> float:
    """Share of a layer's products with weights that split columns over the tensor group: the first of each region."""
    shape = training.shape
    routed = (shape.experts_per_token or 1) * shape.feed_forward + shape.shared_feed_forward
    first = shape.attention_width + 2 * shape.kv_width + (shape.matrices - 1) * routed
    return first / (first + shape.attention_width + routed)


def _pass_seconds(each: _Pass, constants: Constants, ranks: int) -> float:
    """Wall seconds of a microbatch on a rank."""
    kernels = each.forward + each.recompute + each.backward
    device = kernels.device + each.tensor + each.context + each.expert
    return wall(device, _host(kernels, constants, ranks), constants)


def _host(kernels: PassTime, constants: Constants, ranks: int) -> float:
    slower = 1 + constants.host_rank * math.log2(ranks)
    return (kernels.launches * constants.host_launch + kernels.collectives * constants.host_collective) * slower


def _distinct_stages(training: Training) -> list[int]:
    """First, last, and those between that may differ: with a layer more, with one less."""
    last = training.mesh.pp - 1
    left = training.shape.layers % training.mesh.pp
    return sorted({0, last, min(1, last), min(max(1, left), last), max(0, last - 1)})


def _times(training: Training, stage: int, stages: list[int]) -> int:
    """How many ranks are like this stage; stages between are like the nearest one listed with as many layers."""
    last = training.mesh.pp - 1
    if stage in (0, last):
        return 1
    inner = [each for each in stages if each not in (0, last)]
    alike = [each for each in inner if layers_of_stage(training, each) == layers_of_stage(training, stage)]
    if alike[0] != stage:
        return 0
    return sum(layers_of_stage(training, each) == layers_of_stage(training, stage) for each in range(1, last))


def _parameter_gathers(
    training: Training, stage: int, communication: Communication, pass_seconds: float
) -> tuple[float, float]:
    """Exposed and hidden seconds of gathering sharded parameters, for forward and backward of every microbatch; layer
    by layer they run ahead of the kernels."""
    if training.mesh.fsdp == 1:
        return 0.0, 0.0
    each = 2 * communication.gathered_parameters(rank_parameters(training, stage))
    first = each / max(1, layers_of_stage(training, stage)) / 2
    exposed = max(0.0, each - pass_seconds) * training.microbatches + first
    return exposed, max(0.0, each * training.microbatches - exposed)


def slowdown(device: Device) -> float:
    """By what share kernels take longer while a collective runs beside them: it takes a unit for each of its channels,
    and a product is dealt to whole units."""
    units = device.units.value
    return CHANNELS / max(1.0, units - CHANNELS) if device.kind == "cuda" else 0.0


def _gradient_seconds(training: Training, communication: Communication, walls: dict[int, float]) -> tuple[float, float]:
    """Exposed and hidden seconds of summing gradients over data ranks; beside the last microbatch's backward, if asked
    for."""
    whole, seen = 0.0, 0.0
    for stage, seconds in walls.items():
        sent = communication.gradients(rank_parameters(training, stage), training.gradient)
        beside = (
            min(sent * (1 - 1 / max(2, layers_of_stage(training, stage))), seconds / 2) if training.overlap else 0.0
        )
        if sent - beside >= seen:
            whole, seen = sent, sent - beside
    seen += communication.tied_embedding(training.gradient)
    return seen, max(0.0, whole - seen)


def _optimizer(training: Training, stage: int, device: Device, constants: Constants) -> float:
    mesh = training.mesh
    shards = mesh.fsdp * (mesh.dp * mesh.cp if training.zero else 1)
    size = rank_parameters(training, stage) / shards * (_UPDATE_BYTES + 8 * training.states)
    done = work_time([Work("memory", bytes=size, launches=_UPDATE_LAUNCHES)], training.dtype, device, constants)
    return wall(done.device, _host(done, constants, 1), constants)


def _parts(each: _Pass, seconds: float, count: int) -> dict[str, float]:
    """The slowest rank's microbatches by part; what waiting for the host adds is its own part."""
    parts = {
        "forward": each.forward.device, "recompute": each.recompute.device, "backward": each.backward.device,
        "tensor": each.tensor, "context": each.context, "expert": each.expert,
    }  # fmt: skip
    parts["host"] = max(0.0, seconds - sum(parts.values()))
    return {name: count * part for name, part in parts.items()}


def _summary(
    training: Training, device: Device, calibration: Calibration, seconds: float, parts: dict[str, float],
    hidden: dict[str, float], slowest: _Pass,
) -> StepTime:  # fmt: skip
    memory = step_memory(training)
    low, high = calibration.band(device.name)
    flop = training.shape.model_flop(training.batch)
    repeated = {"none": 0.0, "selective": 0.0, "full": 1 / 3}[training.recompute]
    peak = training.mesh.ranks * device.matrix_rate(training.dtype)
    kernels = slowest.forward + slowest.recompute + slowest.backward
    count = training.microbatches
    shares = {
        "compute": kernels.compute * count,
        "memory": kernels.memory * count + parts["optimizer"],
        "network": sum(parts[name] for name in ("tensor", "context", "expert", "pipeline", "data")),
        "bubble": parts["bubble"],
        "host": parts["host"] + parts["step"],
    }
    whole = sum(shares.values()) or 1.0
    shares = {name: share / whole for name, share in sorted(shares.items(), key=lambda item: -item[1])}
    return StepTime(
        seconds=seconds,
        low=seconds * low,
        high=seconds * high,
        parts=parts,
        hidden=hidden,
        memory=memory,
        capacity=float(device.memory),
        mfu=flop / (seconds * peak),
        hfu=flop * (1 + repeated) / (seconds * peak),
        tokens_per_second=training.batch * training.shape.sequence / seconds,
        bound=max(shares, key=lambda name: shares[name]),
        shares=shares,
    )
