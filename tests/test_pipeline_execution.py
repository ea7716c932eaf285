"""Pipelines over gloo in float64: loss, gradients and parameters equal to those of one process, barriers counted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from effcc.errors import PipelineError
from effcc.passes.pipeline_parallel.vocabulary_cascade import output_cascade
from effcc.runtime.pipeline.output_layer import OutputLayer, Shard
from effcc.runtime.pipeline.stages import cut
from effcc.runtime.pipeline.step_graph import export_step, input_head, output_head
from fresh_seed import fresh_random
from pipeline_worker import build
from subprocesses import run_ranks
from torch import nn

#: Barriers that the last stage waits for, by algorithm; the other ranks wait for the first alone.
BARRIERS = {"": [], "one-barrier": [1], "two-barriers": [2], "interlaced": [2]}
#: Live microbatches beyond 1F1B's.
EXTRA = {"": 0, "one-barrier": 1, "two-barriers": 2}


def check(cache: Path, ranks: int, **asked: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_ranks(
        f"import pipeline_worker; pipeline_worker.run({asked!r})", cache, ranks, 240
    )
    # Llama's norms compute in float32 whatever the parameters are: the same numbers in both, so the bound holds too.
    for each in found:
        assert each["loss"] < 1e-12 and each["gradient"] < 1e-12, each
        assert each["apart"] < 1e-9, each
        assert each["live"] <= each["limit"], each
    kind = asked.get("vocabulary", "")
    most: list[int] = max((each["barriers"] for each in found), default=[])
    assert most == BARRIERS[kind]
    if kind:
        assert all(each["waited"] == asked.get("microbatches", 4) for each in found)
    if asked["schedule"] == "1f1b" and kind in EXTRA:
        assert max(each["live"] for each in found) <= ranks // asked.get("replicas", 1) + EXTRA[kind]
    return found


def test_one_barrier(tmp_path: Path) -> None:
    """Tied embeddings, shifted and ignored labels, 1F1B on two ranks, optimizer steps."""
    check(tmp_path, 2, model="plain", schedule="1f1b", vocabulary="one-barrier", embedding=True, layers=2, steps=2)


CASES = [
    *({"schedule": name} for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "v-half")),
    *(
        {"schedule": name, "vocabulary": kind, "embedding": True}
        for name, kind in itertools.product(("1f1b", "v-half"), ("one-barrier", "two-barriers"))
    ),
    {"schedule": "1f1b", "vocabulary": "interlaced", "embedding": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_every_schedule(tmp_path: Path, case: dict[str, Any], model: str, ranks: int) -> None:
    layers = 8 if ranks == 4 else 4
    check(tmp_path, ranks, model=model, layers=layers, microbatches=8, steps=10, **case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one-barrier", "two-barriers"])
def test_upstream_gradients(tmp_path: Path, kind: str) -> None:
    """A scaled loss with label smoothing; the output layer sharded and the embedding not."""
    settings = {"smoothing": 0.1, "shifted": False}
    check(tmp_path, 2, model="llama", schedule="1f1b", vocabulary=kind, settings=settings, scale=4096.0)


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        pytest.param(2, {"microbatches": 2}, id="alone", marks=pytest.mark.slow),
        pytest.param(4, {"microbatches": 2}, id="tied", marks=pytest.mark.slow),
        pytest.param(4, {"vocabulary": "one-barrier", "embedding": True}, id="sharded", marks=pytest.mark.slow),
    ],
)
def test_replicas(tmp_path: Path, ranks: int, case: dict[str, Any]) -> None:
    """Two replicas of one or two stages: gradients of all microbatches of both, added to those of a step before."""
    check(tmp_path, ranks, model="plain", schedule="1f1b", layers=2, replicas=2, accumulated=True, steps=10, **case)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_replicas_of_every_schedule(tmp_path: Path, case: dict[str, Any], model: str) -> None:
    check(tmp_path, 4, model=model, layers=4, microbatches=4, replicas=2, steps=10, **case)


# --- the output layer by itself


@pytest.mark.parametrize("kind", ["one-barrier", "two-barriers"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sharded_output_layer(kind: str, smoothing: float) -> None:
    """All shards in one process: an exchange is a loop over them. Vocabulary not divisible, ignored tokens, a scale per
    token, logits beyond exp's range."""
    draw = fresh_random()
    torch.manual_seed(draw.getrandbits(32))
    ranks, tokens, width, size = draw.choice([(3, 7, 5, 23), (4, 9, 3, 10), (2, 5, 4, 2), (5, 4, 2, 31)])
    hidden = (30 * torch.randn(tokens, width, dtype=torch.float64)).requires_grad_()
    weight = (30 * torch.randn(size, width, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, size, (tokens,))
    target[0] = -1
    scale = torch.rand(tokens, dtype=torch.float64)
    scale[0] = 0.0
    each = nn.functional.cross_entropy(
        hidden @ weight.t(), target, reduction="none", ignore_index=-1, label_smoothing=smoothing
    )
    loss = (each * scale).sum()
    loss.backward()
    cascade = output_cascade(kind, smoothing)
    assert len(cascade.meetings) == {"one-barrier": 1, "two-barriers": 2}[kind]
    layers = [
        OutputLayer(cascade, weight[Shard.of(rank, ranks, size).slice], Shard.of(rank, ranks, size))
        for rank in range(ranks)
    ]
    started = [layer.start(hidden.detach(), target, scale) for layer in layers]
    _exchange(layers, started, 0)
    gradients = [layer.finish(microbatch) for layer, microbatch in zip(layers, started, strict=True)]
    if kind == "two-barriers":
        _exchange(layers, started, 1)
    assert hidden.grad is not None and weight.grad is not None
    for layer, microbatch in zip(layers, started, strict=True):
        torch.testing.assert_close(layer.loss(microbatch), loss.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.input_gradient(microbatch), hidden.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat(gradients), weight.grad, rtol=1e-11, atol=1e-12)


def _exchange(layers: list[OutputLayer], started: list[Any], meeting: int) -> None:
    """Run the layers' exchanges in step: each stops where it would wait for the others."""
    from threading import Barrier, Thread

    gathered: list[Any] = [None] * len(layers)
    together = Barrier(len(layers), timeout=30)

    def run(rank: int) -> None:
        def all_reduce(tensor: torch.Tensor, operation: str) -> torch.Tensor:
            gathered[rank] = tensor
            together.wait()
            whole = torch.stack(gathered)
            found = whole.amax(0) if operation == "max" else whole.sum(0)
            together.wait()
            return found

        layers[rank].exchange(started[rank], meeting, all_reduce)

    threads = [Thread(target=run, args=(rank,)) for rank in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- cutting


def _example(step: nn.Module) -> Any:
    return export_step(step, (torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)))


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_cut_stages_compute_the_step(model: str) -> None:
    """Stages in one process, one after the other: what is handed on is one hidden state, and the work is balanced."""
    step = build(model, 4, shifted=False)
    graph = _example(step)
    stages = cut(graph, 4)
    state = {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers(remove_duplicate=False))}
    ids = torch.randint(0, 53, (2, 8))
    given: dict[str, torch.Tensor] = dict(zip(graph.inputs, (ids, ids), strict=True))
    handed: tuple[Any, ...] = ()
    for stage in stages.stages:
        values = dict(zip((value.name for value in stage.receives), handed, strict=True))
        arguments = [
            values[each.name] if each.kind == "received"
            else given[each.name] if each.kind == "input"
            else graph.constants[each.name] if each.kind == "constant" else state[each.name]
            for each in stage.arguments
        ]  # fmt: skip
        handed = stage.module(*arguments)
        assert len(stage.sends) == (0 if stage.index == 3 else 1)
    # The last stage gives the sum over tokens.
    torch.testing.assert_close(handed[0] / ids.numel(), step(ids, ids), rtol=1e-12, atol=0)
    work = [stage.flop for stage in stages.stages]
    assert max(work) < 1.8 * sum(work) / 4


class _Scored(nn.Module):
    """A language model whose logits are also looked at."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table, self.head, self.how = nn.Embedding(11, 4), nn.Linear(4, 11, bias=how == "bias"), how

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.table(ids))
        if self.how == "read":
            labels = torch.where(logits.sum(-1) > 0, labels, -100)
        if self.how == "scaled":
            logits = logits * 2
        if self.how == "other loss":
            return logits.square().mean()
        if self.how == "transposed":
            return nn.functional.cross_entropy(logits.transpose(1, 2), labels)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("how", "said"),
    [("read", "also read by"), ("scaled", "not a linear without bias"), ("other loss", "not a cross-entropy"),
     ("bias", "without bias"), ("transposed", "not a linear")],
)  # fmt: skip
def test_what_cannot_be_sharded(how: str, said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        output_head(_example(_Scored(how)))


def test_what_is_not_there() -> None:
    graph = _example(build("plain", 2))
    with pytest.raises(PipelineError, match="no parameter with 7 rows"):
        input_head(graph, 7)
    with pytest.raises(PipelineError, match="stages"):
        cut(graph, 4000)
