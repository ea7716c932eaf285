"""A transformer's layers over the stages of a pipeline: who has how many, parameters and bytes.

Memory follows Korthikanti et al. (Reducing activation recomputation in large transformer models, 2022) with flash
attention: of each token a layer keeps, in bf16, the inputs of its two layer norms (2 hidden) and of three projections
(3 hidden), queries, keys and values (3 hidden), what enters and leaves the activation function (2 ffn); and a byte for
each element of two dropout masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .rows import PipelineRow

#: Mixed precision with Adam: bf16 weight and gradient, f32 master weight and two moments.
BYTES_PER_PARAMETER = 2 + 2 + 4 + 4 + 4
#: The optimizer's f32 copies of the gradients. They come when the activations are gone, but no block that activations
#: leave behind is large enough for a weight matrix, so the caching allocator holds them on top.
GRADIENT_COPY = 4
#: What bf16 logits, their f32 copy, the exponentials and the gradient take while an unsharded loss is computed.
LOGIT_BYTES = 2 + 4 + 4 + 2
#: The probabilities that a sharded output layer keeps from S to T.
PROBABILITY_BYTES = 4
#: Traffic of an optimizer step, bytes a parameter: copy of the gradient (2 + 4), its norm (4) and scaling (4 + 4),
#: Adam (4 + 3 * 4 read, 3 * 4 written), the new bf16 weight (4 + 2), the gradient zeroed (2).
OPTIMIZER_TRAFFIC = 54


@dataclass(frozen=True)
class StageMemory:
    """Bytes per rank. ``held``: parameters, their gradients and state, and what the backward of a layer needs besides;
    ``activation``: of one microbatch from F to B; ``output``: from S to T; ``copies``: the optimizer's, as far as they
    do not fit where logits were."""

    held: tuple[int, ...]
    activation: tuple[int, ...]
    output: tuple[int, ...]
    copies: tuple[int, ...]


def layers_per_stage(row: PipelineRow) -> tuple[int, ...]:
    """Layers of each stage: evenly, more to the later ones. For ``redis`` the output layer counts as layers by its
    FLOP, and the last stage gets what the mean leaves beside it, rounded up."""
    if row.method != "redis" or row.ranks == 1:
        return _spread(row.layers, row.ranks)
    output = output_in_layers(row)
    last = max(0, math.ceil((row.layers + output) / row.ranks - output))
    return (*_spread(row.layers - last, row.ranks - 1), last)


def layer_flop(row: PipelineRow) -> float:
    """FLOP of one layer's forward for one token: four square projections and the two of the feed-forward part, and the
    attention of a token to all others (not halved: the kernels of the time did not skip masked blocks)."""
    return 2 * (4 * row.hidden**2 + 2 * row.hidden * row.ffn) + 4 * row.sequence * row.hidden


def output_in_layers(row: PipelineRow) -> float:
    """FLOP of the output layer in units of a transformer layer's."""
    return 2 * row.hidden * row.vocabulary / layer_flop(row)


def _spread(items: int, places: int) -> tuple[int, ...]:
    """Items over places, as evenly as possible, the later places first."""
    return tuple((items + place) // places for place in range(places)) if places else ()


def parameters(row: PipelineRow) -> tuple[int, ...]:
    """Parameters of each rank: layers with biases and norms, learned positions and input embedding on the first, output
    layer on the last, the two vocabulary matrices on all ranks where they are sharded."""
    hidden, ffn = row.hidden, row.ffn
    layer = 4 * hidden**2 + 2 * hidden * ffn + 9 * hidden + ffn
    found = [count * layer for count in layers_per_stage(row)]
    found[0] += row.sequence * hidden
    matrix = row.vocabulary * hidden
    if row.sharded:
        return tuple(count + 2 * matrix // row.ranks for count in found)
    found[0] += matrix
    found[-1] += matrix
    return tuple(found)


def stage_memory(row: PipelineRow) -> StageMemory:
    tokens, hidden, ffn = row.tokens, row.hidden, row.ffn
    layer = tokens * (2 * (8 * hidden + 2 * ffn) + 2 * hidden)
    # Gradients on both sides of the activation function, of queries, keys and values, and of the residual stream.
    working = 2 * tokens * (2 * ffn + 5 * hidden)
    activation = [count * layer for count in layers_per_stage(row)]
    weights = parameters(row)
    output = [0] * row.ranks
    logits = [0] * row.ranks
    if row.sharded:
        share = -(-row.vocabulary // row.ranks)
        output = [tokens * (share * PROBABILITY_BYTES + 2 * hidden)] * row.ranks
        logits = [tokens * share * PROBABILITY_BYTES] * row.ranks
    else:
        logits[-1] = tokens * row.vocabulary * LOGIT_BYTES
        activation[-1] += logits[-1]
    copies = tuple(max(0, GRADIENT_COPY * count - size) for count, size in zip(weights, logits, strict=True))
    held = tuple(BYTES_PER_PARAMETER * count + working for count in weights)
    return StageMemory(held, tuple(activation), tuple(output), copies)
