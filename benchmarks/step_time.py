"""Time and allocator peak of a training step, effcc beside Inductor, in interleaved rounds.

python benchmarks/step_time.py [--models gpt2,llama] [--rounds 15] [--size bench]
"""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any

import torch
from common import allocator_peak, environment, interleaved, keep, median_ratio, models, show, training_step

BACKENDS = ("effcc", "inductor")


def measure(name: str, size: str, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    steps, peak_of = {}, {}
    for backend in BACKENDS:
        sample = models.build(name, size)
        run = torch.compile(sample.model, backend=backend)
        steps[backend] = lambda run=run, sample=sample: training_step(run, sample)
        peak_of[backend] = lambda step=steps[backend], sample=sample: allocator_peak(step, sample.model)
    losses = {backend: float(step()) for backend, step in steps.items()}
    seconds = interleaved(steps, rounds)
    peaks = {backend: peak_of[backend]() for backend in BACKENDS}
    return {
        "model": name,
        **{f"{backend} ms": statistics.median(seconds[backend]) * 1e3 for backend in BACKENDS},
        "time ratio": median_ratio(seconds["effcc"], seconds["inductor"]),
        **{f"{backend} peak MB": peaks[backend] / 1e6 for backend in BACKENDS},
        "peak ratio": peaks["effcc"] / peaks["inductor"],
        "loss difference": abs(losses["effcc"] - losses["inductor"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(models.ZOO))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", default="bench")
    parser.add_argument("--name", default="step_time")
    arguments = parser.parse_args()
    about = environment()
    rows = []
    for name in arguments.models.split(","):
        rows.append(measure(name, arguments.size, arguments.rounds))
        show("training step", rows[-1:])
        gc.collect()
    show("training step", rows)
    print(keep(arguments.name, rows, about))


if __name__ == "__main__":
    main()
