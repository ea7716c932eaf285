"""Training steps on clusters: predicted beside measured and published iteration times.

    EFFCC_BENCH_DATA=... .venv/bin/python benchmarks/cluster_prediction.py

- vTrain's measured rows (``clusters/*_given.csv``): the packaged constants were fitted to three rows in four of these
  files; the errors of the rows that were kept for validation and of those that were trained on are shown apart, beside
  what vTrain reports of itself on all of its rows.
- Megatron-LM's published cases (Korthikanti et al., Reducing activation recomputation in large transformer models,
  2022): nothing was fitted to them. Beside them the errors that the simulator Calculon reports (Isaev et al., 2023).
- FSDP on H100 (``published_h100.py``): nothing was fitted to it either.

Nothing is timed but the predictions themselves. Results go to ``benchmarks/results/cluster_prediction.json``.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import published_h100
from effcc.cost_model.devices import load_device
from effcc.cost_model.parallel_training import fitting
from effcc.cost_model.parallel_training.constants import packaged
from effcc.cost_model.parallel_training.mesh import Mesh
from effcc.cost_model.parallel_training.setup import Training
from effcc.cost_model.parallel_training.shape import TransformerShape
from effcc.cost_model.parallel_training.step import StepTime, predict_step

#: Mean absolute percentage errors that vTrain (Bang et al., MICRO 2024) and Calculon report of themselves.
VTRAIN = {"vtrain_single_given.csv": 8.37, "vtrain_multi_given.csv": 14.73}
CALCULON = {"mean": 3.65, "worst": 8.87}


@dataclass(frozen=True)
class Published:
    """A GPT of the paper's table 3 on A100 80 GB, and its iteration's seconds of table 5 with full recomputation, and
    with selective recomputation and sequence parallelism."""

    name: str
    heads: int
    hidden: int
    layers: int
    pipeline: int
    interleave: int
    batch: int
    microbatch: int
    full: float
    selective: float


MEGATRON = (
    Published("22B", 64, 6144, 48, 1, 1, 4, 4, 1.42, 1.10),
    Published("175B", 96, 12288, 96, 8, 3, 64, 1, 18.13, 13.75),
    Published("530B", 128, 20480, 105, 35, 3, 280, 1, 49.05, 37.83),
    Published("1T", 160, 25600, 128, 64, 1, 512, 1, 94.42, 71.49),
)


def training_of(case: Published, recompute: str) -> Training:
    """The paper's setup: tensor groups of 8, sequence 2048, 51,200 entries, 16 bits, attention written out."""
    shape = TransformerShape(
        layers=case.layers, hidden=case.hidden, heads=case.heads, feed_forward=4 * case.hidden, vocabulary=51200,
        sequence=2048, positions=2048, tied=True, dropout=True,
    )  # fmt: skip
    return Training(
        shape, Mesh(tp=8, pp=case.pipeline), samples=case.microbatch, microbatches=case.batch // case.microbatch,
        recompute=recompute, sequence_parallel=recompute == "selective", interleave=case.interleave, dtype="f16",
        fused_attention=False,
    )  # fmt: skip


def measured_rows(folder: Path) -> list[dict[str, Any]]:
    samples = fitting.load_samples(folder)
    constants = packaged().constants
    found = []
    for part, chosen in (("validation", True), ("training", False)):
        own = [each for each in samples if each.validates is chosen]
        for name, facts in fitting.errors(own, constants).items():
            ratio = np.exp(-fitting.log_ratios([each for each in own if each.cluster == name], constants))
            inside = np.abs(np.log(ratio)) <= packaged().seen
            found.append({
                "rows of": f"{name}, {part}", "rows": facts["rows"], "mean error %": facts["error_percent"],
                "90 % below %": facts["p90_percent"], "in band %": round(100 * float(inside.mean()), 1),
                "vTrain %": VTRAIN[name],
            })  # fmt: skip
    return found


def published_rows() -> list[dict[str, Any]]:
    device = load_device("a100-80g")
    found = []
    for case in MEGATRON:
        for recompute, seconds in (("full", case.full), ("selective", case.selective)):
            made: StepTime = predict_step(training_of(case, recompute), device)
            found.append({
                "model": case.name, "recompute": recompute, "published s": seconds,
                "predicted s": round(made.seconds, 2), "error %": round(100 * (made.seconds / seconds - 1), 2),
                "in band": made.low <= seconds <= made.high, "MFU %": round(100 * made.mfu, 1),
                "memory GiB": round(made.memory.total / 2**30, 1), "bound": made.bound,
                "parts %": {name: round(100 * part / made.seconds, 1) for name, part in made.parts.items() if part},
            })  # fmt: skip
    return found


def main() -> None:
    data = os.environ.get("EFFCC_BENCH_DATA")
    about = common.environment()
    measured = measured_rows(Path(data)) if data else []
    begin = time.perf_counter()
    published = published_rows()
    seconds = time.perf_counter() - begin
    if measured:
        common.show("Measured rows (vTrain's data)", measured)
    else:
        print("EFFCC_BENCH_DATA is not set: no measured rows")
    common.show("Published cases", [{k: v for k, v in row.items() if k != "parts %"} for row in published])
    errors = [abs(row["error %"]) for row in published]
    summary = {
        "mean error %": round(sum(errors) / len(errors), 2), "worst error %": max(errors),
        "Calculon's mean %": CALCULON["mean"], "Calculon's worst %": CALCULON["worst"],
        "seconds for eight predictions": round(seconds, 3),
    }  # fmt: skip
    common.show("Published cases, together", [summary])
    h100 = published_h100.rows()
    common.show("FSDP on H100, older kernels than are predicted", h100)
    if measured:
        about |= {"calibration": dict(packaged().provenance), "summary": summary}
        common.keep("cluster_prediction", [*measured, *published, *h100], about)


if __name__ == "__main__":
    main()
