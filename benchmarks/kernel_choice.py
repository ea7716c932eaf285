"""Ways to generate a fused cascade's kernels: their prices beside measured times, and the chosen one beside the rule's.

    python benchmarks/kernel_choice.py [--rounds 15] [--rows 512,1024]

Attention in several variants, forward and backward, as torch.compile would fuse it: every variant of each kernel
(``codegen/kernel_variants.py``) is compiled and timed in interleaved rounds. Needs ``effcc calibrate`` before, in the
same environment. ``chosen over rule``: measured time of what the prices choose over that of the generator's own rule.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import environment, keep, show
from effcc.cascade_fusion import choice_for
from effcc.codegen.cascade_kernel import build
from effcc.codegen.fused_kernel import prepare_fused
from effcc.cost_model.calibrate import calibrated_device
from effcc.passes.raising.choose import choose
from effcc.passes.raising.fusion_choice import ALIKE
from effcc.passes.raising.group import Group
from effcc.passes.raising.raise_graph import raise_graph

HEADS, WIDTH = 4, 64
Scores = Callable[[torch.Tensor], torch.Tensor]


def causal(scores: torch.Tensor) -> torch.Tensor:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf"))


VARIANTS: dict[str, Scores] = {"plain": lambda s: s, "causal": causal, "softcap": lambda s: 30 * torch.tanh(s / 30)}


def groups_of(scores: Scores, rows: int) -> tuple[Group, ...]:
    """What a training step's graph with one attention is fused to."""
    from raised_graphs import record  # of the tests, whose folder benchmarks/common.py adds

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(scores(q @ k.transpose(-1, -2) / 8), -1) @ v

    operands = [torch.randn(1, HEADS, rows, WIDTH, requires_grad=True) for _ in range(3)]
    (run,) = [each for each in record(step, operands) if each.phase == "joint"]
    choice = replace(choice_for(calibrated_device(), False), variants=None, gain=0.0, chunk_bytes=0)
    return choose(raise_graph(run.graph), choice).groups


def operand(kind: Any) -> torch.Tensor:
    shape, stride = [int(size) for size in kind.shape], kind.stride
    if kind.dtype != "f32":
        return torch.zeros(shape, dtype=torch.bool)
    made = torch.empty(shape)
    if stride and 0 not in stride:
        made = torch.empty_strided(shape, [int(step) for step in stride])
    return made.normal_()


def measure(group: Group, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant: its price, and its shortest time."""
    variants = choice_for(calibrated_device(), False).variants
    assert variants is not None, "run effcc calibrate first"
    found = variants(group)
    kernels = [
        prepare_fused(replace(group.fused, schedule=dict(each.schedule)), group.rewriting, wide=frozenset(group.wide))
        for each in found
    ]
    build([each.kernel for each in kernels])
    operands = [operand(kind) for kind in group.fused.operands]
    best = [float("inf")] * len(kernels)
    for number in range(rounds + 1):
        for index, kernel in enumerate(kernels):
            begin = time.perf_counter()
            kernel(operands)
            if number:
                best[index] = min(best[index], time.perf_counter() - begin)
    cheapest = min(each.seconds for each in found)
    chosen = next(each for each in found if each.seconds == cheapest)
    if chosen.seconds > (1 - ALIKE) * found[0].seconds:
        chosen = found[0]
    return [
        {
            "variant": each.what,
            "priced ms": each.seconds * 1e3,
            "measured ms": seconds * 1e3,
            "chosen": each is chosen,
            "rule": each is found[0],
        }
        for each, seconds in zip(found, best, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", default="512,1024")
    arguments = parser.parse_args()
    rows, summary = [], []
    for name, scores in VARIANTS.items():
        for length in map(int, arguments.rows.split(",")):
            for number, group in enumerate(groups_of(scores, length)):
                found = measure(group, arguments.rounds)
                rows += [{"attention": name, "rows": length, "kernel": number + 1} | each for each in found]
                times = {key: np.array([each[key] for each in found]) for key in ("priced ms", "measured ms")}
                ranks = [np.argsort(np.argsort(values)) for values in times.values()]
                chosen, rule = (next(e["measured ms"] for e in found if e[which]) for which in ("chosen", "rule"))
                summary.append({
                    "attention": name, "rows": length, "kernel": number + 1, "variants": len(found),
                    "Spearman": float(np.corrcoef(*ranks)[0, 1]) if len(found) > 2 else "",
                    "chosen over rule": chosen / rule, "best over rule": times["measured ms"].min() / rule,
                })  # fmt: skip
                show("kernels", summary[-1:])
    show("ways to generate a kernel", summary)
    print(keep("kernel_choice", [*rows, *summary], environment()))


if __name__ == "__main__":
    main()
