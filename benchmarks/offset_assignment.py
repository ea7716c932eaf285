"""Offset assignment: height against the lower bound, and time, on public and generated problems.

    .venv/bin/python benchmarks/offset_assignment.py [--capacity 1048576] [--time-limit 20] [FILE.csv ...]

Without files: every ``*.csv`` in ``$EFFCC_BENCH_DATA/memory_mapping`` (MiniMalloc's challenging instances) and
generated training steps of 24,000 and 75,000 buffers. Results go to ``benchmarks/results/offset_assignment.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
from effcc.cost_model.offset_assignment import csv_format
from effcc.cost_model.offset_assignment.problem import Problem
from effcc.cost_model.offset_assignment.solver import solve
from effcc.ir.mapping_validator import validate_mapping
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "offset_assignment.json"
#: Sizes of a generated layer's tensors: hidden states, projections, scores, statistics.
SIZES = (1 << 20, 3 << 20, 4 << 20, 1 << 19, 3 << 18, 11 << 18, 1 << 16, 1 << 12, 3584)


def training_step(layers: int, ops: int, seed: int) -> Problem:
    """Buffers of a training step: of each op's forward and backward, saved values that live from one to the other,
    workspaces, values kept for a skip connection, and weight gradients, a third of them to the end."""
    generator = np.random.default_rng(seed)
    end = 2 * layers * ops
    pattern = [
        (generator.integers(len(SIZES)), generator.random() < 0.4, int(generator.integers(1, 6))) for _ in range(ops)
    ]
    rows: list[tuple[int, int, int]] = []
    for layer in range(layers):
        scale = generator.choice([1.0, 1.0, 0.75, 0.5])
        for number, (kind, saved, reach) in enumerate(pattern):
            begin = layer * ops + number
            back = end - 1 - begin
            size = max(512, int(SIZES[kind] * scale) // 512 * 512)
            rows.append((begin, end - begin if saved else begin + 1 + reach, size))
            rows.append((back, min(back + 1 + reach, end), size))
            if generator.random() < 0.3:
                rows.append((begin, begin + 1, SIZES[generator.integers(len(SIZES))]))
            if generator.random() < 0.2:
                other = int(SIZES[generator.integers(len(SIZES))] * generator.random()) // 512 * 512 + 512
                rows.append((max(begin - 200, 0), min(begin + 300, end), other))
            if generator.random() < 0.2:
                rows.append((back, end if generator.random() < 0.3 else min(back + 40, end), size))
    lower, upper, sizes = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    return Problem(lower, upper, sizes, np.full(sizes.size, 64, np.int64))


def problems(files: list[Path]) -> dict[str, Problem]:
    """The problems to solve, by name."""
    data = os.environ.get("EFFCC_BENCH_DATA")
    if not files and data:
        files = sorted(Path(data, "memory_mapping").glob("*.csv"))
    found = {file.name: csv_format.read(file.read_text(), str(file)).problem for file in files}
    if len(found) == 0 or data:
        found["training step, 80 layers"] = training_step(80, 110, 0)
        found["training step, 126 layers"] = training_step(126, 220, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--capacity", type=int, help="for the files; without it, and for generated steps, the least")
    parser.add_argument("--time-limit", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = Table("instance", "buffers", "lower bound", "height", "gap", "seconds", "status", "solver")
    rows = []
    for name, problem in problems(arguments.files).items():
        capacity = arguments.capacity if name.endswith(".csv") else None
        begin = time.perf_counter()
        result = solve(problem, capacity, time_limit=arguments.time_limit, seed=arguments.seed)
        seconds = time.perf_counter() - begin
        columns = {"lower": problem.lower, "upper": problem.upper, "size": problem.size, "offset": result.offsets}
        listed = {key: column.astype(str).tolist() for key, column in columns.items()}
        validate_mapping(
            [{"id": str(b), **{key: values[b] for key, values in listed.items()}} for b in range(problem.size.size)],
            result.height,
        )
        rows.append(
            {
                "instance": name,
                "buffers": int(problem.size.size),
                "capacity": capacity,
                "lower_bound": result.lower_bound,
                "height": result.height,
                "gap": result.gap,
                "seconds": seconds,
                "status": result.status,
                "solver": result.solver,
            }
        )
        table.add_row(
            name, str(problem.size.size), str(result.lower_bound), str(result.height), f"{result.gap:.4%}",
            f"{seconds:.2f}", result.status, result.solver,
        )  # fmt: skip
    Console(width=160).print(table)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "time_limit": arguments.time_limit,
        "seed": arguments.seed,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
