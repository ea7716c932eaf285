"""Training steps with sharded parameters on H100, as published: nothing is fitted to them.

MosaicML's table of MPT models (github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md, "H100 80GB BF16",
2023): PyTorch's FSDP with FULL_SHARD, kernels launched one by one, an attention written in Triton for A100. Compiled
models with today's attention are faster than that, so the predictions, which are for those, lie below these times.
"""

from __future__ import annotations

from typing import Any

from effcc.cost_model.devices import load_device
from effcc.cost_model.parallel_training.mesh import Mesh
from effcc.cost_model.parallel_training.setup import Training
from effcc.cost_model.parallel_training.shape import TransformerShape
from effcc.cost_model.parallel_training.step import predict_step

#: Model -> hidden size, heads, layers.
MPT = {
    "1b": (2048, 16, 24), "3b": (2560, 20, 32), "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 56, 48),
    "70b": (8192, 64, 80),
}  # fmt: skip
#: Model, sequence, GPUs, samples of a microbatch, microbatches, whether activations are checkpointed, tokens a second
#: and GPU.
ROWS = (
    ("1b", 512, 8, 56, 4, False, 52275), ("1b", 2048, 8, 14, 1, False, 45455), ("1b", 8192, 8, 3, 4, False, 29157),
    ("3b", 512, 8, 40, 6, False, 27965), ("3b", 2048, 16, 10, 3, False, 24142), ("3b", 8192, 8, 3, 6, False, 16578),
    ("7b", 1024, 8, 64, 2, True, 10203), ("7b", 2048, 8, 6, 1, False, 10643), ("7b", 4096, 8, 16, 2, True, 8611),
    ("7b", 8192, 8, 8, 2, True, 6935), ("13b", 1024, 8, 40, 3, True, 5502), ("13b", 2048, 8, 2, 1, False, 4792),
    ("13b", 2048, 64, 2, 1, False, 4800), ("30b", 2048, 8, 3, 21, True, 2002), ("30b", 2048, 32, 14, 3, True, 2308),
    ("70b", 2048, 64, 8, 4, True, 1039),
)  # fmt: skip


def rows() -> list[dict[str, Any]]:
    device = load_device("h100")
    found = []
    for model, sequence, gpus, samples, microbatches, checkpointed, tokens in ROWS:
        hidden, heads, layers = MPT[model]
        shape = TransformerShape(
            layers=layers, hidden=hidden, heads=heads, feed_forward=4 * hidden, vocabulary=50368, sequence=sequence,
            positions=sequence, tied=True,
        )  # fmt: skip
        training = Training(
            shape, Mesh(fsdp=gpus), samples=samples, microbatches=microbatches,
            recompute="full" if checkpointed else "none", sequence_parallel=False,
        )  # fmt: skip
        made = predict_step(training, device)
        seconds = training.batch * sequence / (tokens * gpus)
        found.append({
            "model": f"MPT-{model}", "sequence": sequence, "GPUs": gpus, "published s": round(seconds, 3),
            "predicted s": round(made.seconds, 3), "error %": round(100 * (made.seconds / seconds - 1), 1),
            "in band": made.low <= seconds <= made.high, "MFU %": round(100 * made.mfu, 1),
        })  # fmt: skip
    return found
