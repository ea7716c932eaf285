"""One rank of a pipeline over gloo, beside the same step in one process; to be called in each process of a group."""

from __future__ import annotations

import json
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh


class Step(nn.Module):
    """A language model with its loss: the mean over all positions that are not ignored."""

    def __init__(self, model: nn.Module, smoothing: float = 0.0, shifted: bool = True) -> None:
        super().__init__()
        self.model, self.smoothing, self.shifted = model, smoothing, shifted

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=ids).logits
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), label_smoothing=self.smoothing
        )


class Plain(nn.Module):
    """A small language model with tied embeddings that needs no library."""

    def __init__(self, layers: int, vocabulary: int, width: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.table(input_ids)
        for layer in self.layers:
            x = x + layer(x) + x.cumsum(1) / 8
        return SimpleNamespace(logits=self.head(x))


def build(name: str, layers: int, vocabulary: int = 53, **settings: Any) -> Step:
    """A tiny model in float64, its weights from a fixed seed."""
    torch.manual_seed(0)
    if name == "plain":
        return Step(Plain(layers, vocabulary).double(), **settings)
    import transformers

    if name == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=12, n_embd=16, n_layer=layers, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, use_cache=False,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    return Step(model.double(), **settings)


def batch(microbatches: int, vocabulary: int = 53) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Microbatches of two rows; some labels are ignored, not equally many in each."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(microbatches):
        ids = torch.randint(0, vocabulary, (2, 8), generator=generator)
        labels = torch.where(torch.rand(2, 8, generator=generator) < 0.2, -100, ids)
        found.append((ids, labels))
    return found


def schedule_of(name: str, ranks: int, microbatches: int, vocabulary: str, embedding: bool) -> Any:
    from effcc.passes.pipeline_parallel import classic, v_shape
    from effcc.passes.pipeline_parallel import vocabulary as woven

    if name == "v-half":
        return v_shape.v_half(ranks, microbatches, vocabulary, embedding)
    if vocabulary:
        return woven.vocabulary_1f1b(ranks, microbatches, vocabulary, embedding=embedding)
    makers: dict[str, Any] = {
        "gpipe": classic.gpipe, "1f1b": classic.one_forward_one_backward, "interleaved": classic.interleaved,
        "zb-h1": classic.zero_bubble_h1, "zb-v": v_shape.zb_v,
    }  # fmt: skip
    return makers[name](ranks, microbatches)


def main(asked: dict[str, Any]) -> dict[str, Any]:
    from effcc.passes.pipeline_parallel.schedule import live_limit
    from effcc.runtime.pipeline.executor import PipelineRank
    from effcc.runtime.pipeline.stages import cut
    from effcc.runtime.pipeline.step_graph import export_step, input_head, output_head

    torch.set_num_threads(1)
    replicas, count, scale = asked.get("replicas", 1), asked.get("microbatches", 4), asked.get("scale", 1.0)
    ranks = dist.get_world_size() // replicas
    mesh = init_device_mesh("cpu", (ranks, replicas), mesh_dim_names=("pp", "dp")) if replicas > 1 else None
    vocabulary, embedding = asked.get("vocabulary", ""), asked.get("embedding", False)
    schedule = schedule_of(asked["schedule"], ranks, count, vocabulary, embedding)
    step = build(asked["model"], asked.get("layers", 4), **asked.get("settings", {}))
    everything = batch(count * replicas)
    place = dist.get_rank() % replicas
    data = everything[place * count : (place + 1) * count]
    graph = export_step(step, data[0])
    head = output_head(graph) if vocabulary else None
    stages = cut(graph, schedule.stages, head, input_head(graph, head.size) if head and embedding else None)
    state = {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers(remove_duplicate=False))}
    pipeline = PipelineRank(schedule, stages, state, scale=scale, timeout=timedelta(seconds=20), mesh=mesh)

    whole = (torch.cat([ids for ids, _ in everything]), torch.cat([labels for _, labels in everything]))
    mine = [pipeline.parameters.named[path] for path in sorted(pipeline.parameters.named)]
    theirs = dict(step.named_parameters())
    optimizers = [torch.optim.AdamW(each, lr=1e-3) for each in (mine, list(theirs.values()))]
    found: dict[str, Any] = {}
    if asked.get("accumulated"):  # a step's gradients are added to those that are there, which are sums already
        pipeline.step(data)
        (step(*whole) * scale).backward()
    for number in range(asked.get("steps", 1)):
        if number or not asked.get("accumulated"):
            for optimizer in optimizers:
                optimizer.zero_grad()
        report = pipeline.step(data)
        loss = step(*whole) * scale
        loss.backward()
        apart = {
            path: distance(leaf.grad, part(theirs[path].grad, pipeline, path))
            for path, leaf in pipeline.parameters.named.items()
        }
        if number == 0:
            found = {
                "rank": dist.get_rank(), "loss": abs(report.loss - float(loss.detach())) / abs(float(loss.detach())),
                "gradient": max(apart.values()), "where": max(apart, key=apart.__getitem__),
                "barriers": sorted(set(report.barriers.values())), "waited": len(report.barriers),
                "live": max(report.live.values()), "limit": live_limit(schedule)[pipeline.rank],
                "parameters": len(apart),
            }  # fmt: skip
        for optimizer in optimizers:
            optimizer.step()
    found["apart"] = max(
        distance(leaf, part(theirs[path], pipeline, path)) for path, leaf in pipeline.parameters.named.items()
    )
    dist.barrier()
    pipeline.close()
    return found


def part(whole: torch.Tensor | None, pipeline: Any, path: str) -> torch.Tensor:
    """The rows of a whole parameter that the rank holds."""
    assert whole is not None
    shard = pipeline.parameters.sharded.get(path)
    return whole if shard is None else whole[shard.slice]


def distance(found: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """Greatest difference relative to the tensor's greatest entry."""
    assert found is not None
    size = max(float(wanted.detach().abs().max()), 1e-30) if wanted.numel() else 1.0
    return float((found - wanted).detach().abs().max()) / size if wanted.numel() else 0.0


def run(asked: dict[str, Any]) -> None:
    """Print what the rank found as a line of JSON."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    print(json.dumps(main(asked)))
    dist.destroy_process_group()
