"""The kernels of a transformer's layer, head and embedding on one rank, for one microbatch.

Counted from the layers themselves (Vaswani et al., 2017; tensor and sequence parallelism as in Megatron-LM, Shoeybi et
al., 2019, and Korthikanti et al., 2022): matrix products with their sizes, and the bytes of all other kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .setup import Training

#: Bytes that a token and vocabulary entry moves in the loss, forward and backward: the logits to f32, their maximum,
#: subtraction, exponential, sum, division; the gradient's scaling and its cast back (Megatron-LM's
#: vocab_parallel_cross_entropy, read).
LOSS_FORWARD, LOSS_BACKWARD = 36, 16

#: Megatron-LM's fused softmax needs a multiple of this many heads times samples (its is_kernel_available, read).
SOFTMAX_ROWS = 4


@dataclass(frozen=True)
class Work:
    """``launches`` kernels: ``batch`` products (rows, depth) @ (depth, columns), or ``bytes`` that are moved.

    ``kind``: ``product``, ``scores`` (a product over an attention's scores), ``fused`` (an attention in one kernel;
    ``flop`` says how much is computed) or ``memory``. ``weight``: the product has a weight, whose gradient is one more.
    """

    kind: str
    rows: int = 0
    depth: int = 0
    columns: int = 0
    batch: int = 1
    bytes: float = 0.0
    flop: float = 0.0
    launches: int = 1
    weight: bool = True


def _product(rows: int, depth: int, columns: int, batch: int = 1) -> Work:
    return Work("product", rows, max(1, depth), max(1, columns), batch)


def _memory(size: float, launches: int = 1) -> Work:
    return Work("memory", bytes=size, launches=launches)


def attention_core(training: Training) -> list[Work]:
    """Scores, softmax, dropout and the weighted values: what selective recomputation repeats."""
    shape, mesh, element = training.shape, training.mesh, training.element
    heads = shape.heads // mesh.tp
    queries, keys = shape.sequence // mesh.cp, shape.sequence
    scores = float(training.samples * heads * queries * keys)
    if training.fused_attention:
        share = 0.5 if shape.causal else 1.0
        return [Work("fused", flop=4 * scores * shape.head_size * share, weight=False)]
    batch = training.samples * heads
    # scale, mask and softmax are one kernel where four rows of it make a block, else several, some of them in f32
    softmax = _memory(2 * scores * element) if batch % SOFTMAX_ROWS == 0 else _memory(scores * (4 * element + 16), 6)
    works = [
        Work("scores", queries, shape.head_size, keys, batch, weight=False),
        softmax,
        Work("scores", queries, keys, shape.head_size, batch, weight=False),
        _memory(2 * training.tokens * shape.attention_width / mesh.tp * element),
    ]
    if shape.dropout:
        works.insert(2, _memory(scores * (2 * element + 1)))
    return works


def layer_forward(training: Training) -> list[Work]:
    """The forward of one layer."""
    shape, mesh, element, tokens = training.shape, training.mesh, training.element, training.tokens
    rest = tokens * shape.hidden / training.sequence_shards * element
    add = rest * (3 + (1 / element if shape.dropout else 0))
    split = mesh.tp
    return [
        _memory(2 * rest),
        _product(tokens, shape.hidden, (shape.attention_width + 2 * shape.kv_width) // split),
        *_turned(training),
        *attention_core(training),
        _product(tokens, shape.attention_width // split, shape.hidden),
        _memory(add),
        _memory(2 * rest),
        *_feed_forward(training),
        _memory(add),
    ]


def _turned(training: Training) -> list[Work]:
    """Rotary embeddings: queries and keys are read, and written anew for the attention."""
    shape = training.shape
    width = (shape.attention_width + shape.kv_width) / training.mesh.tp
    return [_memory(2 * training.tokens * width * training.element)] if shape.rotary else []


def sharded_copies(training: Training, parameters: float) -> list[Work]:
    """Of one microbatch with sharded parameters: what each gather brought is copied into tensors of its own, in forward
    and backward, and gradients are laid together for the reduce-scatter, in the type that they are summed in (torch's
    fully_shard: copy-out of the all-gather, copy-in of the reduce-scatter; its source, read)."""
    if training.mesh.fsdp == 1:
        return []
    moved = parameters * (2 * 2 * training.element + training.element + training.gradient)
    return [_memory(moved, 3 * training.shape.layers // training.mesh.pp)]


def _feed_forward(training: Training) -> list[Work]:
    shape, element, tokens, split = training.shape, training.element, training.tokens, training.mesh.tp
    up = shape.matrices - 1
    works: list[Work] = []
    widths = [(shape.feed_forward, tokens, 1)]
    if shape.experts:
        local = shape.experts // training.mesh.ep
        routed = tokens * shape.experts_per_token
        widths = [(shape.feed_forward, max(1, routed // local), local)]
        works = [
            _product(tokens, shape.hidden, shape.experts),
            _memory(tokens * shape.experts * 12, 4),
            _memory(4 * routed * shape.hidden * element, 4),  # tokens to their experts and back
        ]
        if shape.shared_feed_forward:
            widths.append((shape.shared_feed_forward, tokens, 1))
    for width, rows, batch in widths:
        works += [
            _product(rows, shape.hidden, up * width // split, batch),
            _memory((up + 1) * batch * rows * width / split * element),
            _product(rows, width // split, shape.hidden, batch),
        ]
    return works


def backward(works: Sequence[Work], accumulate: float = 0.0) -> list[Work]:
    """The backward of what ``works`` compute; ``accumulate`` bytes of gradients are added to those of the microbatches
    before."""
    found: list[Work] = []
    for work in works:
        if work.kind == "memory":
            found.append(replace(work, bytes=1.5 * work.bytes))
        elif work.kind == "fused":  # five products for the forward's two (Dao et al., 2022)
            found.append(replace(work, flop=2.5 * work.flop, launches=3))
        else:
            found.append(replace(work, depth=work.columns, columns=work.depth))
            found.append(replace(work, rows=work.depth, depth=work.rows))
    if accumulate:
        found.append(_memory(accumulate, 4))
    return found


def head_forward(training: Training) -> list[Work]:
    """Last norm, output layer and loss."""
    shape, tokens, split = training.shape, training.tokens, training.mesh.tp
    columns = shape.vocabulary // split
    return [
        _memory(2 * tokens * shape.hidden / training.sequence_shards * training.element),
        _product(tokens, shape.hidden, columns),
        _memory(float(tokens) * columns * LOSS_FORWARD, 8),
    ]


def head_backward(training: Training) -> list[Work]:
    columns = training.shape.vocabulary // training.mesh.tp
    found = backward([work for work in head_forward(training) if work.kind != "memory"])
    return [*found, _memory(float(training.tokens) * columns * LOSS_BACKWARD, 4)]


def embedding_forward(training: Training) -> list[Work]:
    size = training.tokens * training.shape.hidden / training.sequence_shards * training.element
    return [_memory(3 * size, 4)]


def embedding_backward(training: Training) -> list[Work]:
    """The rows' gradients, and the whole table's, zeroed and added to what is there."""
    shape, mesh = training.shape, training.mesh
    rows = training.tokens * shape.hidden * training.element
    table = shape.vocabulary * shape.hidden / mesh.tp * training.element
    return [_memory(3 * rows + 4 * table, 4)]
