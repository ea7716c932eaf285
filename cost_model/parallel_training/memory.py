"""Bytes that the fullest rank of a training step holds, by what they are.

Activations are the tensors that the backward reads, counted from the layer (Korthikanti et al., 2022, section 4, where
the same counts give ``s·b·h·(34 + 5·a·s/h)`` bytes a layer in 16 bits). State follows Rajbhandari et al. (ZeRO, 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from .setup import Training

#: What the CUDA context, NCCL's buffers and the libraries' workspaces take; an assumption, stated with the result.
RESERVED = 2 * 2**30


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    gathered: float
    reserved: float = RESERVED

    @property
    def total(self) -> float:
        return float(sum(getattr(self, each.name) for each in fields(self)))


def rank_parameters(training: Training, stage: int) -> float:
    """Parameters of one rank of a stage, before any sharding over data ranks."""
    shape, mesh = training.shape, training.mesh
    layers = layers_of_stage(training, stage)
    expert = shape.experts * shape.expert_parameters / mesh.ep
    count = layers * (shape.dense_layer_parameters + expert)
    if stage == 0:
        count += shape.embedding_parameters
    if stage == mesh.pp - 1 and not (shape.tied and mesh.pp == 1):
        count += shape.vocabulary * shape.hidden
    return count / mesh.tp


def layers_of_stage(training: Training, stage: int) -> int:
    """Layers of a pipeline rank: as even as they go, the first ranks taking what is left over."""
    each, left = divmod(training.shape.layers, training.mesh.pp)
    return each + (1 if stage < left else 0)


def saved_by_layer(training: Training) -> float:
    """Bytes of activations that one layer keeps for its backward, of one microbatch."""
    shape, mesh, element = training.shape, training.mesh, training.element
    tokens, shards = float(training.tokens), training.sequence_shards
    stream = tokens * shape.hidden * element / shards
    if training.recompute == "full":
        return stream
    mask = 1 / element if shape.dropout else 0.0
    saved = 2 * stream * (2 + mask)  # inputs of both norms and of what they feed, with both dropout masks
    saved += tokens * (2 * shape.attention_width + 2 * shape.kv_width) / mesh.tp * element
    if training.fused_attention:
        saved += tokens * shape.heads / mesh.tp * 4
    elif training.recompute == "none":
        scores = tokens * shape.sequence * shape.heads / mesh.tp
        saved += scores * element * (2 + mask if shape.dropout else 1)
    routed = shape.experts_per_token if shape.experts else 1
    width = routed * shape.feed_forward + shape.shared_feed_forward
    saved += tokens * width * (shape.matrices if shape.gated else 2) / mesh.tp * element
    if shape.experts:
        saved += 2 * tokens * routed * shape.hidden * element
    return saved


def live_microbatches(training: Training, stage: int) -> float:
    """Microbatches whose activations a rank holds at its fullest, in units of all of its layers, under 1F1B;
    interleaved schedules begin more (Narayanan et al., 2021)."""
    mesh = training.mesh
    if training.interleave == 1:
        return float(min(training.microbatches, mesh.pp - stage))
    stages = training.interleave
    begun = (stages - 1) * mesh.pp + 2 * (mesh.pp - 1 - stage) + 1
    return min(float(training.microbatches), begun / stages)


def step_memory(training: Training) -> StepMemory:
    """Memory of the fullest rank."""
    return max((_of_stage(training, stage) for stage in _stages(training)), key=lambda memory: memory.total)


def _stages(training: Training) -> list[int]:
    """First, last, and one between: the others hold no more."""
    return sorted({0, training.mesh.pp - 1, min(1, training.mesh.pp - 1)})


def _of_stage(training: Training, stage: int) -> StepMemory:
    shape, mesh, element = training.shape, training.mesh, training.element
    own = rank_parameters(training, stage)
    replicas = mesh.dp * mesh.cp
    sharded = own / mesh.fsdp
    state = 4.0 * training.states + (4 if element < 4 else 0)
    saved = saved_by_layer(training)
    layers = layers_of_stage(training, stage)
    activations = live_microbatches(training, stage) * layers * saved
    if training.recompute == "full":  # the layer whose forward is being repeated
        activations += saved_by_layer(replace(training, recompute="none"))
    logits = 0.0
    if stage == mesh.pp - 1:
        logits = float(training.tokens) * shape.vocabulary / mesh.tp * (4 + element)
    gathered = 2 * own / max(1, layers) * element if mesh.fsdp > 1 else 0.0
    return StepMemory(
        parameters=sharded * element,
        gradients=sharded * training.gradient / (replicas if training.zero == 2 else 1),
        optimizer=sharded * state / (replicas if training.zero else 1),
        activations=activations,
        logits=logits,
        gathered=gathered,
    )
