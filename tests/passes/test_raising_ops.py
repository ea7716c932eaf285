"""Each kind of op, raised and held against eager float64, NaNs and infinities included; and what must stay as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fresh_seed import fresh_random
from raised_graphs import check_raised, record
from torch import Tensor
from torch.nn import functional as F

INF = float("inf")


def _x(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(fresh_random().getrandbits(32))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _index(top: int, *shape: int) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(fresh_random().getrandbits(32)))


_OPS: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "pointwise": (lambda x, y: torch.relu(x) * y.neg().exp() - (x / y).tanh() ** 2, lambda: (_x(3, 4), _x(4))),
    "comparisons": (lambda x, y: torch.where((x > y) & ~(x > 0) | (y <= -1), x, y * 2), lambda: (_x(3, 4), _x(3, 1))),
    "clamp": (lambda x: x.clamp(-0.5, 0.3) + x.clamp(min=0.1).rsqrt(), lambda: (_x(3, 4),)),
    "masked_fill": (lambda x: x.masked_fill(x > 0, -INF).softmax(-1), lambda: (_x(5, 2),)),
    "sum of booleans": (lambda x: (x > 0).sum(-1) * x.mean((0, 1), keepdim=True).squeeze(0), lambda: (_x(3, 4),)),
    "variance": (lambda x: x.var((0, 2)) + x.var(1, unbiased=False).sum(), lambda: (_x(3, 4, 5),)),
    "extrema": (lambda x: x.amax((0, 2)) - x.amin((0, 2)) + x.max(), lambda: (_x(3, 4, 5),)),
    "logsumexp": (lambda x: x.logsumexp((0, 1)) + F.log_softmax(x, 0)[0, 0], lambda: (_x(3, 4, 5),)),
    "any and all": (lambda x: x * (x > 1).any(1, keepdim=True) + (x > -3).all() * 1.0, lambda: (_x(3, 4),)),
    "split heads": (lambda x: x.view(2, 5, 3, 4).transpose(1, 2).reshape(6, 5, 4).sum(1), lambda: (_x(2, 5, 12),)),
    "merge and split otherwise": (lambda x: x.reshape(6, 4).reshape(3, 8) * 2, lambda: (_x(2, 3, 4),)),
    "no common factors": (lambda x: (x.reshape(4, 6) + 1).sum(0), lambda: (_x(6, 4),)),
    "slices": (lambda x: x[1:-1, ::2] * x[:-2, 1::2] + x[2:, :1] + x.flip(1)[1:3, :3], lambda: (_x(4, 6),)),
    "slice of split": (lambda x: x.view(4, 6)[:, 2:4].sum(1) * x[::6], lambda: (_x(24),)),
    "select": (lambda x: x[0] * x[-1] + x.unbind(1)[2].sum(), lambda: (_x(3, 4),)),
    "chunks": (lambda x: torch.stack([a * 2 for a in x.chunk(3, -1)]).sum(0), lambda: (_x(2, 9),)),
    "cat": (lambda x, y: torch.cat([x, y * 2, x], 1).cumsum(0) + torch.cat([y, x, x], 1), lambda: (_x(3, 2), _x(3, 4))),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1), value=-7.0).exp(), lambda: (_x(3, 2),)),
    "repeat": (lambda x: x.repeat(2, 3).sum() * x.repeat_interleave(3, 1), lambda: (_x(2, 4),)),
    "triangles": (lambda x: torch.tril(x) - torch.triu(x, 2), lambda: (_x(4, 5),)),
    "aranges": (lambda x: x * torch.arange(3, 15, 3)[None] - torch.arange(3)[:, None], lambda: (_x(3, 4),)),
    "products": (lambda x, y: x @ y + torch.einsum("ij,jk->ik", x, y), lambda: (_x(3, 4), _x(4, 5))),
    "batched": (lambda x, y: torch.bmm(x, y).sum(0) @ y[0].t(), lambda: (_x(2, 3, 4), _x(2, 4, 5))),
    "linear": (lambda x, w, b: F.linear(x, w, b), lambda: (_x(2, 3, 4), _x(5, 4), _x(5))),
    "vectors": (lambda x, y: (x @ y) * torch.dot(y, y) + torch.outer(y, y).sum(), lambda: (_x(3, 4), _x(4))),
    "gather": (lambda x, i: x.gather(1, i) + x.gather(0, i[:1, :1].expand(1, 6)), lambda: (_x(3, 6), _index(3, 3, 1))),
    "embedding": (lambda w, i: F.embedding(i, w).sum(1) + w[i[0]].sum(0), lambda: (_x(7, 3), _index(7, 2, 4))),
    "one hot": (lambda x, i: F.one_hot(i, 5) * x, lambda: (_x(3, 5), _index(5, 3))),
    "scatter": (lambda x, i: x.scatter(1, i, 2.0) + x.scatter(1, i, x[:, :1] * 2), lambda: (_x(3, 5), _index(5, 3, 1))),
    "scatter_add": (lambda x, i: x.scatter_add(1, i, x[:, :1] * 2), lambda: (_x(3, 5), _index(5, 3, 1))),
    "cross entropy": (
        lambda x, i: F.cross_entropy(x, i, ignore_index=1, label_smoothing=0.2)
        + F.cross_entropy(x, i, reduction="sum"),
        lambda: (_x(6, 4), _index(4, 6)),
    ),
    "norms": (lambda x, w: F.layer_norm(x, (4,), w) + F.rms_norm(x, (4,), w, eps=1e-3), lambda: (_x(2, 3, 4), _x(4))),
    "attention": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), lambda: (_x(2, 5, 4), _x(2, 5, 4))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _OPS)
@pytest.mark.parametrize("decomposed", [True, False], ids=["decomposed", "composite"])
def test_op(name: str, decomposed: bool) -> None:
    function, make = _OPS[name]
    inputs = make()
    with torch.no_grad():
        (run,) = record(function, inputs, decomposed=decomposed)
    keep = [node.name for node in run.graph.nodes]
    _, compared = check_raised(run, keep=keep)
    assert compared >= 1
    trained = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    if name not in ("sum of booleans", "any and all", "one hot"):
        for run in record(function, trained, decomposed=decomposed):
            check_raised(run, keep=[node.name for node in run.graph.nodes])


@pytest.mark.parametrize("value", [INF, -INF, float("nan")])
def test_infinities_and_nans_are_eagers(value: float) -> None:
    x = _x(3, 4)
    x[0, 1] = x[2, 3] = value
    function = lambda x: torch.cat([x.softmax(-1), torch.relu(x) - x.amax(0), x * 2 - x.mean(0)])  # noqa: E731
    with torch.no_grad():
        (run,) = record(function, [x])
    check_raised(run)


def test_a_product_with_zero_is_not_zero() -> None:
    """``x * 0`` is NaN where x is infinite, so it must not be simplified away."""
    with torch.no_grad():
        (run,) = record(lambda x: (x * 0 + x - x).sum(0), [torch.tensor([[INF, 1.0], [2.0, 3.0]], dtype=torch.float64)])
    raised, _ = check_raised(run)
    assert set(raised.kept.values()) <= {"an operand cancels"}


_STAYS: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]], str]] = {
    "random": (lambda x: F.dropout(x, 0.5) * 2, lambda: (_x(3, 4),), "no rule"),
    "rounded to integers": (lambda x: x.long() * 2, lambda: (_x(3, 4),), "drops fractions"),
    "rounded division": (
        lambda x: torch.div(x, 0.3, rounding_mode="floor") * 2, lambda: (_x(3, 4),), "rounded division"
    ),
    "no rule": (lambda x: torch.cumsum(x, 0) * 2, lambda: (_x(3, 4),), "no rule"),
    "sorted": (lambda x: x.sort(0).values + 1, lambda: (_x(3, 4),), "no rule"),
    "bits of integers": (lambda i: (i & 3) + 1, lambda: (_index(9, 5),), "bits"),
}  # fmt: skip


@pytest.mark.parametrize("name", _STAYS)
def test_what_is_not_proven_stays(name: str) -> None:
    function, make, why = _STAYS[name]
    with torch.no_grad():
        (run,) = record(function, make(), decomposed=name not in ("random", "rounded division"))
    raised, compared = check_raised(run)
    assert any(why in reason for reason in raised.kept.values())
    assert compared >= 1
