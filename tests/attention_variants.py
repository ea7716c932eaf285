"""Attention of many kinds, and losses and norms, in plain PyTorch: what the cascades are raised from.

Each ``Variant`` is a function of tensors and a maker of its inputs. Nothing in the functions is written for a compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem: ``keys`` 0 means as many as queries; ``groups`` query heads share a key head."""

    batch: int = 2
    heads: int = 4
    queries: int = 12
    keys: int = 0
    width: int = 8
    groups: int = 1

    @property
    def key_count(self) -> int:
        return self.keys or self.queries


@dataclass(frozen=True)
class Variant:
    """``function(*make(shape, dtype, generator))``. ``differentiable`` are the positions of inputs with a gradient.

    ``one_pass`` tells whether it shall become one kernel that keeps no tensor of queries times keys.
    """

    name: str
    function: Callable[..., Tensor]
    make: Callable[[Shape, torch.dtype, torch.Generator], tuple[Tensor, ...]]
    differentiable: tuple[int, ...] = (0, 1, 2)
    shape: Shape = Shape()
    one_pass: bool = True

    def __str__(self) -> str:
        return self.name

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32, shape: Shape | None = None) -> tuple[Tensor, ...]:
        return self.make(shape or self.shape, dtype, torch.Generator().manual_seed(seed))


def _randn(g: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)


def _qkv(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    key_heads = s.heads // s.groups
    return (
        _randn(g, dtype, s.batch, s.heads, s.queries, s.width),
        _randn(g, dtype, s.batch, key_heads, s.key_count, s.width),
        _randn(g, dtype, s.batch, key_heads, s.key_count, s.width),
    )


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def vanilla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(_scores(q, k), dim=-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    hidden = torch.triu(torch.ones(s.shape[-2:], dtype=torch.bool), diagonal=1)
    return torch.softmax(s.masked_fill(hidden, float("-inf")), dim=-1) @ v


def causal_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    seen = torch.tril(torch.ones(s.shape[-2], s.shape[-1]))
    return torch.softmax(torch.where(seen == 0, torch.finfo(s.dtype).min, s), dim=-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    s = _scores(q, k)
    distance = torch.arange(k.shape[-2])[None, :] - torch.arange(q.shape[-2])[:, None]
    s = s + slopes[:, None, None] * distance
    return torch.softmax(s.masked_fill(distance > 0, float("-inf")), dim=-1) @ v


def _with_slopes(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / s.heads) for h in range(s.heads)], dtype=dtype)
    return (*_qkv(s, dtype, g), slopes)


def t5_bucket(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """T5's buckets of relative positions, as its authors write them (both directions)."""
    half = buckets // 2
    bucket = (distance > 0).long() * half
    distance = distance.abs()
    exact = half // 2
    far = exact + (torch.log(distance.float() / exact) / math.log(furthest / exact) * (half - exact)).long()
    far = torch.minimum(far, torch.full_like(far, half - 1))
    return bucket + torch.where(distance < exact, distance, far)


def t5_relative(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    distance = torch.arange(k.shape[-2])[None, :] - torch.arange(q.shape[-2])[:, None]
    bias = functional.embedding(t5_bucket(distance, table.shape[0], 16), table).permute(2, 0, 1)
    return torch.softmax(q @ k.transpose(-1, -2) + bias[None], dim=-1) @ v


def _with_table(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*_qkv(s, dtype, g), _randn(g, dtype, 8, s.heads))


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(30 * torch.tanh(_scores(q, k) / 30), dim=-1) @ v


def _positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]


def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = _positions(q, k)
    seen = (j <= i) & (i - j < 5)
    return torch.softmax(torch.where(seen, _scores(q, k), float("-inf")), dim=-1) @ v


def prefix_lm(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
    i, j = _positions(q, k)
    seen = (j <= i) | (j < prefix[:, None, None, None])
    return torch.softmax(_scores(q, k).masked_fill(~seen, float("-inf")), dim=-1) @ v


def _with_prefix(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*_qkv(s, dtype, g), torch.randint(1, s.key_count, (s.batch,), generator=g))


def document_mask(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    i, j = _positions(q, k)
    seen = (document[:, :, None] == document[:, None, :])[:, None] & (j <= i)
    return torch.softmax(_scores(q, k).masked_fill(~seen, float("-inf")), dim=-1) @ v


def _with_documents(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    ids = torch.randint(0, 3, (s.batch, s.queries), generator=g).sort(dim=-1).values
    return (*_qkv(s, dtype, g), ids)


def grouped_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return vanilla(q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))


def grouped_query_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As transformers repeats heads: expand, then reshape."""
    b, heads, n, d = k.shape
    groups = q.shape[1] // heads
    k = k[:, :, None].expand(b, heads, groups, n, d).reshape(b, heads * groups, n, d)
    v = v[:, :, None].expand(b, heads, groups, n, d).reshape(b, heads * groups, n, d)
    return causal(q, k, v)


def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return vanilla(q, k, v)


def sink(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> Tensor:
    """A learned logit a head that takes part in the softmax and has no value (gpt-oss)."""
    s = _scores(q, k)
    own = logit[None, :, None, None].expand(*s.shape[:-1], 1)
    largest = torch.maximum(s.amax(-1, keepdim=True), own).detach()
    weights = torch.exp(s - largest)
    return (weights / (weights.sum(-1, keepdim=True) + torch.exp(own - largest))) @ v


def sink_joined(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> Tensor:
    """The same, with the logit joined to the scores as one more column, as transformers does."""
    s = _scores(q, k)
    own = logit[None, :, None, None].expand(*s.shape[:-1], 1)
    return torch.softmax(torch.cat([s, own], dim=-1), dim=-1)[..., :-1] @ v


def _with_logit(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*_qkv(s, dtype, g), _randn(g, dtype, s.heads))


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def qk_norm(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return vanilla(_rms(q, a), _rms(k, b), v)


def _with_two_weights(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*_qkv(s, dtype, g), _randn(g, dtype, s.width), _randn(g, dtype, s.width))


def temperature(q: Tensor, k: Tensor, v: Tensor, tau: Tensor) -> Tensor:
    return torch.softmax(_scores(q, k) * tau[:, None, None], dim=-1) @ v


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(_scores(q, k) - math.log(k.shape[-2])) @ v


def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return vanilla(q, k, v) * torch.sigmoid(gate)


def _with_gate(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*_qkv(s, dtype, g), _randn(g, dtype, s.batch, s.heads, s.queries, s.width))


def differential(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """The difference of two softmaxes (Differential Transformer); q and k hold both halves."""
    q1, q2 = q.chunk(2, dim=-1)
    k1, k2 = k.chunk(2, dim=-1)
    first, second = torch.softmax(_scores(q1, k1), -1), torch.softmax(_scores(q2, k2), -1)
    return (first - weight * second) @ v


def _with_scalar(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*_qkv(s, dtype, g), _randn(g, dtype, 1))


def latent(q: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, up_k: Tensor, up_v: Tensor) -> Tensor:
    """Multi-head latent attention (DeepSeek): keys and values from one latent, and a shared rotary part."""
    k = torch.einsum("bnc,hcd->bhnd", c, up_k)
    v = torch.einsum("bnc,hcd->bhnd", c, up_v)
    s = (q @ k.transpose(-1, -2) + q_rope @ k_rope[:, None].transpose(-1, -2)) / math.sqrt(
        q.shape[-1] + q_rope.shape[-1]
    )
    hidden = torch.triu(torch.ones(s.shape[-2:], dtype=torch.bool), diagonal=1)
    return torch.softmax(s.masked_fill(hidden, float("-inf")), dim=-1) @ v


def _for_latent(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    rope, inner = s.width // 2, s.width
    return (
        _randn(g, dtype, s.batch, s.heads, s.queries, s.width),
        _randn(g, dtype, s.batch, s.heads, s.queries, rope),
        _randn(g, dtype, s.batch, s.key_count, inner),
        _randn(g, dtype, s.batch, s.key_count, rope),
        _randn(g, dtype, s.heads, inner, s.width),
        _randn(g, dtype, s.heads, inner, s.width),
    )


def additive_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(_scores(q, k) + mask, dim=-1) @ v


def _with_mask(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*_qkv(s, dtype, g), _randn(g, dtype, s.batch, 1, s.queries, s.key_count))


def boolean_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(_scores(q, k).masked_fill(~mask, float("-inf")), dim=-1) @ v


def _with_boolean_mask(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    mask = torch.rand(s.batch, 1, s.queries, s.key_count, generator=g) < 0.7
    mask[..., 0] = True
    return (*_qkv(s, dtype, g), mask)


def _with_empty_rows(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    """Some rows see no key at all."""
    mask = torch.rand(s.batch, 1, s.queries, s.key_count, generator=g) < 0.7
    mask[:, :, ::3] = False
    return (*_qkv(s, dtype, g), mask)


def padded(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """A left-padded batch with a finite mask: a row of padding averages evenly."""
    i, j = _positions(q, k)
    seen = (j <= i) & padding[:, None, None, :]
    bias = torch.zeros((), dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
    return torch.softmax(_scores(q, k) + bias, dim=-1) @ v


def _with_padding(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    first = torch.randint(0, s.key_count - 1, (s.batch,), generator=g)
    return (*_qkv(s, dtype, g), torch.arange(s.key_count)[None] >= first[:, None])


def builtin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def builtin_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def builtin_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def joint_projection(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Self-attention with one projection for queries, keys and values, and a residual, 4 heads."""
    b, n, c = x.shape
    q, k, v = (x @ weight).view(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
    return x + causal(q, k, v).transpose(1, 2).reshape(b, n, c) @ out


def _for_projection(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    c = 4 * s.width
    return (
        _randn(g, dtype, s.batch, s.queries, c),
        _randn(g, dtype, c, 3 * c) / math.sqrt(c),
        _randn(g, dtype, c, c) / math.sqrt(c),
    )


def rotary(q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions as transformers writes them, then causal attention."""

    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * angles.cos() + turned * angles.sin()

    return causal(turn(q), turn(k), v)


def _with_angles(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    steps = torch.arange(s.queries, dtype=torch.float64)[:, None] / 10.0 ** torch.arange(s.width // 2)[None]
    return (*_qkv(s, dtype, g), torch.cat([steps, steps], -1).to(dtype))


def decode(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """One new token a sequence against a long cache of which ``length`` positions are filled."""
    seen = torch.arange(k.shape[-2]) < length[:, None, None, None]
    return torch.softmax(_scores(q, k).masked_fill(~seen, float("-inf")), dim=-1) @ v


def _with_length(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*_qkv(s, dtype, g), torch.randint(1, s.key_count, (s.batch,), generator=g))


def dropout_free_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights themselves, kept beside the output: joined so that one tensor comes back."""
    weights = torch.softmax(_scores(q, k), dim=-1)
    return torch.cat([weights @ v, weights], dim=-1)


ATTENTION: tuple[Variant, ...] = (
    Variant("vanilla", vanilla, _qkv),
    Variant("causal", causal, _qkv),
    Variant("causal_tril", causal_tril, _qkv),
    Variant("alibi", alibi, _with_slopes),
    Variant("t5_relative", t5_relative, _with_table, (0, 1, 2, 3)),
    Variant("softcap", softcap, _qkv),
    Variant("sliding_window", sliding_window, _qkv),
    Variant("prefix_lm", prefix_lm, _with_prefix),
    Variant("document_mask", document_mask, _with_documents),
    Variant("grouped_query", grouped_query, _qkv, shape=Shape(groups=2)),
    Variant("grouped_query_expanded", grouped_query_expanded, _qkv, shape=Shape(groups=2)),
    Variant("multi_query", multi_query, _qkv, shape=Shape(groups=4)),
    Variant("cross", vanilla, _qkv, shape=Shape(keys=7)),
    Variant("sink", sink, _with_logit, (0, 1, 2, 3)),
    Variant("sink_joined", sink_joined, _with_logit, (0, 1, 2, 3)),
    Variant("qk_norm", qk_norm, _with_two_weights, (0, 1, 2, 3, 4)),
    Variant("temperature", temperature, _with_logit, (0, 1, 2, 3)),
    Variant("sigmoid", sigmoid_attention, _qkv),
    Variant("gated", gated, _with_gate, (0, 1, 2, 3)),
    Variant("differential", differential, _with_scalar, (0, 1, 2, 3)),
    Variant("latent", latent, _for_latent, (0, 1, 2, 3, 4, 5)),
    Variant("additive_mask", additive_mask, _with_mask, (0, 1, 2, 3)),
    Variant("boolean_mask", boolean_mask, _with_boolean_mask),
    Variant("empty_rows", boolean_mask, _with_empty_rows),
    Variant("padded", padded, _with_padding),
    Variant("builtin", builtin, _qkv),
    Variant("builtin_causal", builtin_causal, _qkv),
    Variant("builtin_mask", builtin_mask, _with_mask),
    Variant("joint_projection", joint_projection, _for_projection),
    Variant("rotary", rotary, _with_angles),
    Variant("decode", decode, _with_length, shape=Shape(queries=1, keys=24)),
    Variant("weights_kept", dropout_free_weights, _qkv, one_pass=False),
)


# Losses and norms ----------------------------------------------------------------------------------------------------


def linear_cross_entropy(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(h @ w.t(), target)


def linear_cross_entropy_smoothed(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(h @ w.t(), target, ignore_index=0, label_smoothing=0.1)


def linear_cross_entropy_weighted(h: Tensor, w: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return functional.cross_entropy(h @ w.t(), target, weight=weight, ignore_index=-100)


def linear_cross_entropy_rows(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(h @ w.t(), target, reduction="none")


def _for_loss(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    """``queries`` tokens of ``width`` features and ``keys`` words."""
    return (
        _randn(g, dtype, s.queries, s.width),
        _randn(g, dtype, s.key_count, s.width),
        torch.randint(0, s.key_count, (s.queries,), generator=g),
    )


def _for_weighted_loss(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    h, w, target = _for_loss(s, dtype, g)
    target[::4] = -100
    return h, w, target, torch.rand(s.key_count, generator=g, dtype=torch.float64).to(dtype) + 0.5


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), weight, bias)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _rms(x, weight) + bias


def layer_norm_linear(x: Tensor, weight: Tensor, bias: Tensor, matrix: Tensor) -> Tensor:
    return layer_norm(x, weight, bias) @ matrix


def _for_norm(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (
        _randn(g, dtype, s.queries, s.width),
        _randn(g, dtype, s.width),
        _randn(g, dtype, s.width),
    )


def _for_norm_linear(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*_for_norm(s, dtype, g), _randn(g, dtype, s.width, 5))


def entropy(h: Tensor, w: Tensor) -> Tensor:
    p = torch.log_softmax(h @ w.t(), dim=-1)
    return -(p.exp() * p).sum(-1)


def _two(s: Shape, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    return _for_loss(s, dtype, g)[:2]


def kernel_density(x: Tensor, y: Tensor) -> Tensor:
    """No matrix product and no softmax: the sum of a function of all pairs' distances."""
    return torch.exp(-(x[:, None] - y[None]).square().sum(-1)).sum(-1).log()


_WORDS = Shape(queries=10, keys=23, width=6)

LOSSES: tuple[Variant, ...] = (
    Variant("linear_cross_entropy", linear_cross_entropy, _for_loss, (0, 1), _WORDS),
    Variant("linear_cross_entropy_smoothed", linear_cross_entropy_smoothed, _for_loss, (0, 1), _WORDS),
    Variant("linear_cross_entropy_weighted", linear_cross_entropy_weighted, _for_weighted_loss, (0, 1), _WORDS),
    Variant("linear_cross_entropy_rows", linear_cross_entropy_rows, _for_loss, (0, 1), _WORDS),
    Variant("entropy", entropy, _two, (0, 1), _WORDS),
    Variant("kernel_density", kernel_density, _two, (0, 1), _WORDS),
)
NORMS: tuple[Variant, ...] = (
    Variant("layer_norm", layer_norm, _for_norm, (0, 1, 2), one_pass=False),
    Variant("rms_norm", rms_norm, _for_norm, (0, 1, 2), one_pass=False),
    Variant("layer_norm_linear", layer_norm_linear, _for_norm_linear, (0, 1, 2, 3), one_pass=False),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (*ATTENTION, *LOSSES, *NORMS)}


def with_gradients(variant: Variant, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies of the inputs; those that are differentiable ask for a gradient."""
    return tuple(
        tensor.detach().clone().requires_grad_(position in variant.differentiable)
        for position, tensor in enumerate(inputs)
    )


def eager(variant: Variant, inputs: tuple[Tensor, ...], gradient: Any = None) -> tuple[Tensor, ...]:
    """The output and, given its gradient, the gradients of the differentiable inputs."""
    inputs = with_gradients(variant, inputs) if gradient is not None else inputs
    output = variant.function(*inputs)
    if gradient is None:
        return (output,)
    wanted = [inputs[position] for position in variant.differentiable]
    return (output, *torch.autograd.grad(output, wanted, gradient))
