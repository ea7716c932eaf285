"""What each rank does in the tests of expert-parallel execution; prints one line of JSON."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from effcc.errors import ExpertParallelError
from effcc.runtime.expert_parallel import ExpertParallel, parallelize_experts
from torch.distributed.device_mesh import init_device_mesh

EXPERTS, LAYERS, VOCABULARY = 8, 3, 97


def moe(kind: str, k: int, width: int = 32) -> Any:
    """A small Mixtral or Qwen3-MoE with random weights, equal on all ranks, in float64."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    common: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=LAYERS, head_dim=8,
        num_attention_heads=4, num_key_value_heads=1, num_experts_per_tok=k, bos_token_id=0, eos_token_id=0,
        pad_token_id=None, use_cache=False, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    if kind == "mixtral":
        model: Any = MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, sliding_window=6, **common))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=16, **common))
    model.set_experts_implementation("eager")  # grouped products have no float64
    return model.double()


def random_slots(width: int, seed: int) -> list[list[int]]:
    """Each expert once, the rest of the slots filled with copies, in random order."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(LAYERS):
        row = [*range(EXPERTS), *torch.randint(EXPERTS, (width - EXPERTS,), generator=generator).tolist()]
        rows.append([row[i] for i in torch.randperm(width, generator=generator).tolist()])
    return rows


def begin() -> tuple[int, int]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def finish(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def share(ids: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return ids.chunk(ranks)[rank]


def equalities(cases: list[tuple[str, int, str, int]], seed: int) -> None:
    """For each (kind, k, mode, slots): logits and all gradients beside those of one process, in the second call."""
    rank, ranks = begin()
    finish(rank=rank, cases=[equality(*case, seed, rank, ranks) for case in cases])


def replicated(kind: str, k: int, mode: str, width: int, seed: int) -> None:
    """Two replicas of experts that are spread over the other axis of the mesh."""
    rank, ranks = begin()
    finish(rank=rank, **equality(kind, k, mode, width, seed, rank, ranks, 2))


def equality(
    kind: str, k: int, mode: str, width: int, seed: int, rank: int, ranks: int, replicas: int = 1
) -> dict[str, Any]:
    plain = moe(kind, k).train()
    model = copy.deepcopy(plain)
    names = ("ep", "dp")
    mesh = init_device_mesh("cpu", (ranks // replicas, replicas), mesh_dim_names=names) if replicas > 1 else None
    parallel = parallelize_experts(
        model, random_slots(width, seed), mode=mode, ranks=ranks // replicas, mesh=mesh, time_limit=60
    )
    ids = torch.randint(0, VOCABULARY, (2 * ranks, 9), generator=torch.Generator().manual_seed(seed))
    mine = share(ids, rank, ranks)
    for _ in range(2):
        plain.zero_grad()
        model.zero_grad()
        wanted = plain(input_ids=ids).logits
        found = parallel(mine).logits
        loss = F.cross_entropy(found.flatten(0, 1), mine.flatten(), reduction="sum") / ids.numel()
        loss.backward()
        parallel.reduce_gradients()
        F.cross_entropy(wanted.flatten(0, 1), ids.flatten()).backward()
    outputs = (found - share(wanted, rank, ranks)).abs().max() / wanted.abs().max()
    return {
        "mode": mode, "k": k, "outputs": outputs.item(), "gradients": gradient_distance(parallel, plain),
        "chosen": parallel.chosen, "exchanges": parallel.wire.exchanges,
    }  # fmt: skip


def gradient_distance(parallel: ExpertParallel, plain: Any) -> float:
    """Largest distance of a gradient, relative to the largest of its parameter, but at least a twentieth of the model's
    (a top-1 router that normalises its weight has a gradient of nothing but float32's rounding)."""
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    floor = max(gradient.abs().max().item() for gradient in wanted.values()) * 0.05
    worst = 0.0
    for name, parameter in parallel.model.named_parameters():
        block, inner, tail = name.partition(".experts.experts.")
        gradient = wanted[f"{block}.experts.{tail}" if inner else name]
        if inner:
            gradient = gradient[list(parallel.blocks[block].held)]
        distance = (parameter.grad - gradient).abs().max().item()
        worst = max(worst, distance / max(gradient.abs().max().item(), floor))
    return worst


def measured_bytes(kind: str, k: int, seed: int, slots: list[list[list[int]]]) -> None:
    """For each placement and mode: bytes that this rank sends in a forward of new inputs, and what was predicted for
    all ranks from the routing of others."""
    rank, ranks = begin()
    rows = []
    generator = torch.Generator().manual_seed(seed)
    others, ids = (torch.randint(0, VOCABULARY, (300 * ranks, 12), generator=generator) for _ in range(2))
    for chosen in slots:
        for mode in ("home", "coherent"):
            model = moe(kind, k, 64).eval()
            parallel = parallelize_experts(model, chosen, mode="auto", time_limit=60)
            with torch.no_grad():
                parallel(share(others, rank, ranks))
                predicted = parallel.predicted(parallel.choices(), parallel.homes)
                parallel.chosen = mode
                before = parallel.bytes_sent
                parallel(share(ids, rank, ranks))
            rows.append({"mode": mode, "sent": parallel.bytes_sent - before, "predicted": predicted[mode]})
    finish(rank=rank, rows=rows)


def fault(what: str) -> None:
    """One rank fails in some way; each that lives prints the error it ends with."""
    rank, ranks = begin()
    model = moe("mixtral", 2)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    width = EXPERTS + -EXPERTS % ranks
    slots = random_slots(width, 2 if what == "mismatch" and rank == 1 else 1)
    try:
        parallel = parallelize_experts(
            model, [row[:-1] for row in slots] if what == "indivisible" else slots,
            ranks=3 if what == "world" else None, time_limit=6,
        )  # fmt: skip
        layer = model.model.layers[1].mlp

        def hook(*_: Any) -> None:
            if rank == ranks - 1 and what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == ranks - 1 and what == "slow":
                import time

                time.sleep(45)

        layer.register_forward_pre_hook(hook)
        parallel(ids)
    except ExpertParallelError as error:
        print(json.dumps({"rank": rank, "error": str(error)}), flush=True)
        sys.stdout.flush()
        os._exit(3)  # as a process that raises ends, but without waiting for the group
    print(json.dumps({"rank": rank, "error": ""}), flush=True)
