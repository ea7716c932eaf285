"""A sequence split over ranks on gloo in float64: loss, gradients and parameters equal to those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effcc.context_parallel import split_sequence
from effcc.errors import PipelineError
from effcc.runtime.context_parallel.rewrite import attentions, take
from fresh_seed import fresh_random
from pipeline_worker import Step, build
from subprocesses import run_ranks
from torch import nn


def check(cache: Path, ranks: int, bound: float = 1e-12, **asked: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_ranks(
        f"import context_parallel_worker; context_parallel_worker.run({asked!r})", cache, ranks, 240
    )
    for each in found:
        assert each["loss"] < bound and each["gradient"] < bound, each
        assert each["apart"] < 1e3 * bound, each
    return found


def test_ring(tmp_path: Path) -> None:
    """Attention written out, two ranks, an optimizer step."""
    found = check(tmp_path, 2, model="gpt2", form="ring", attention="eager", microbatches=1)
    # Keys and values of half a sequence: 2 rows x 4 tokens x 16 features of 8 bytes, 2 layers. Forward: once; backward:
    # once, and their gradients, which go all the way round, twice.
    block = 2 * (2 * 4 * 16 * 8) * 2
    assert all(each["sent"] == block * (1 + 1 + 2) for each in found)


CASES = [
    {"ranks": 4, "model": "gpt2", "attention": "eager"},
    {"ranks": 4, "model": "gpt2", "attention": "sdpa"},
    {"ranks": 2, "model": "llama", "attention": "sdpa"},
    {"ranks": 4, "model": "llama", "attention": "sdpa", "pp": 2, "layers": 4, "schedule": "zb-h1"},
    {"ranks": 4, "model": "gpt2", "attention": "sdpa", "pp": 2, "layers": 4, "vocabulary": "one-barrier"},
    {"ranks": 4, "model": "llama", "attention": "sdpa", "pp": 2, "layers": 4, "vocabulary": "two-barriers"},
    {"ranks": 4, "model": "gpt2", "attention": "eager", "dp": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ring", "tree"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_meshes(tmp_path: Path, case: dict[str, Any], form: str) -> None:
    """Both forms, models, ways to write attention; with pipelines, sharded vocabularies and replicas. Ten steps."""
    check(tmp_path, form=form, steps=10, microbatches=4, **case)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ring", "tree"])
def test_softmax_in_float32(tmp_path: Path, form: str) -> None:
    """Llama's written-out softmax rounds to float32, which the merged states do not."""
    check(tmp_path, 2, 1e-6, model="llama", form=form, attention="eager")


def test_keys_that_heads_share_travel_once() -> None:
    """Llama repeats keys for the heads of a group; the operands of the split attention are those before it."""
    ids = torch.zeros(2, 8, dtype=torch.long)
    (only,) = attentions(split_sequence(build("llama", 1, shifted=False), (ids, ids), 2))
    keys = [only.operands[at] for at in only.travelling]
    assert len(keys) == 2 and len(only.asking) == 1
    assert all(sorted(each.sizes) == [2, 8, 8] for each in keys)  # one of two heads
    reductions = [each.reduction for each in only.cascade.monoid.components]
    assert reductions.count("sum") == 2 and "max" in reductions


def test_taking_a_part() -> None:
    """Of a dimension that holds several sequences one behind the other."""
    draw = fresh_random()
    groups, parts, tokens = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 3)
    whole = torch.randn(2, groups, parts * tokens, 3)
    part = draw.randrange(parts)
    found = take(whole.flatten(1, 2), 1, groups, part, parts)
    wanted = whole[:, :, part * tokens : (part + 1) * tokens].flatten(1, 2)
    assert torch.equal(found, wanted)


class Mixed(nn.Module):
    """A language model with one op of its own between table and head."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.table, self.head, self.op = nn.Embedding(11, 4), nn.Linear(4, 11), op

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.op(self.table(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (lambda x: x + x.cumsum(1), "it works along the tokens"),
        (lambda x: x - x.mean(1, keepdim=True), "it takes all tokens together"),
        (lambda x: x.reshape(x.shape[0], 4, -1).transpose(1, 2), "mixes tokens with other dimensions"),
        (lambda x: x.flip(1), "no rule"),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), "is read at 2 places"),
    ],
    ids=["cumsum", "mean", "reshape", "flip", "no projections"],
)
def test_what_mixes_tokens_is_refused(op: Any, said: str) -> None:
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(PipelineError, match=said):
        split_sequence(Mixed(op), (ids, ids), 2)


@pytest.mark.slow
def test_other_refusals() -> None:
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(PipelineError, match="3 ranks do not divide"):
        split_sequence(build("gpt2", 1, shifted=False), (ids, ids), 3)
    with pytest.raises(PipelineError, match="no whole share"):  # 7 of 8 logits
        split_sequence(build("gpt2", 1), (ids, ids), 2)
    with pytest.raises(PipelineError, match="in the form 'star'"):
        split_sequence(build("gpt2", 1, shifted=False), (ids, ids), 2, form="star")
    step = build("gpt2", 1, shifted=False)
    assert isinstance(step, Step)
    for module in step.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    step.model.set_attn_implementation("eager")
    with pytest.raises(PipelineError, match="has dropout"):
        split_sequence(step.train(), (ids, ids), 2)
