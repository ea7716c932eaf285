"""``effcc.train_step`` beside the ordinary loop: allocator peak, resident size and time of a step at several budgets.

python benchmarks/train_step.py [--layers 12] [--width 512] [--batch 2] [--length 256] [--shares 1,0.5,0.3,0]
                                [--steps 5] [--swap-dir DIR] [--name train_step]

The model is a Llama of transformers with random weights, trained with AdamW. A budget is given as a share of the way
from the least that works (0) to the ordinary loop's peak (1). Each budget runs in a process of its own, so that the
resident size is its own; times are the median of ``--steps`` steps after two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from common import allocator_peak, environment, keep, models, show

MIB = 2**20


def build(arguments: argparse.Namespace) -> models.Sample:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=arguments.width, intermediate_size=8 * arguments.width // 3,
        num_hidden_layers=arguments.layers, num_attention_heads=8, num_key_value_heads=8, use_cache=False,
        max_position_embeddings=arguments.length, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    return models.text_sample(LlamaForCausalLM(config), 8192, arguments.batch, arguments.length)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One way to train, in this process. A ``budget`` of 0: the ordinary loop; below 0: the least that works."""
    import effcc

    sample = build(arguments)
    optimizer = torch.optim.AdamW(sample.model.parameters(), lr=1e-4)
    batch = (sample.inputs, sample.target)
    training = None
    if arguments.budget:
        training = effcc.train_step(
            sample.model, optimizer, models.loss_of, memory_budget=max(arguments.budget, 1), swap_dir=arguments.swap_dir
        )
        if arguments.budget < 0:
            try:
                training(*batch)
            except effcc.EffccError:
                training.memory_budget = training.floor

    def step() -> float:
        if training is not None:
            return float(training(*batch))
        loss = models.loss_of(sample.model(**sample.inputs), sample.target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    losses = [step(), step()]
    seconds = []
    for _ in range(arguments.steps):
        begin = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begin)
    everything = [*sample.model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    held = training.held_bytes(batch) if training is not None else sum(value.nbytes for value in everything)
    resident = psutil.Process().memory_info().rss
    return {
        "budget": training.memory_budget if training is not None else None,
        "floor": training.floor if training is not None else None,
        "peak": held + allocator_peak(step, torch.nn.Module()),
        "resident": resident,
        "seconds": statistics.median(seconds),
        "losses": losses,
        "spending": str(training.spending) if training is not None else "",
    }


def in_own_process(budget: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--budget", str(budget)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("width", 512), ("batch", 2), ("length", 256), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shares", default="1,0.5,0.3,0")
    parser.add_argument("--swap-dir", default=None, type=Path)
    parser.add_argument("--name", default="train_step")
    parser.add_argument("--budget", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.budget is not None:
        print(json.dumps(measure(arguments)))
        return
    about = environment()
    plain = in_own_process(0)
    least = in_own_process(-1)
    shares = [float(share) for share in arguments.shares.split(",")]
    budgets = [int(least["budget"] + share * (plain["peak"] - least["budget"])) for share in shares]
    runs = {"ordinary loop": plain} | {
        f"budget {share:g}": least if share == 0 else in_own_process(budget)
        for share, budget in zip(shares, budgets, strict=True)
    }
    rows = [
        {
            "model": name,
            "budget MiB": (run["budget"] or 0) / MIB,
            "peak MiB": run["peak"] / MIB,
            "resident MiB": run["resident"] / MIB,
            "step ms": run["seconds"] * 1e3,
            "time ratio": run["seconds"] / plain["seconds"],
            "same losses": run["losses"] == plain["losses"],
            "spending": run["spending"],
        }
        for name, run in runs.items()
    ]
    show("training step", [{key: value for key, value in row.items() if key != "spending"} for row in rows])
    for row in rows[1:]:
        print(f"{row['model']}: {row['spending']}")
    print(keep(arguments.name, rows, about))


if __name__ == "__main__":
    main()
