"""CSV of measured training iterations: model shape, mesh, batch, and the iteration's milliseconds.

Columns (those of vTrain's published measurements; Bang et al., MICRO 2024)::

    # GPUs, global batch, micro batch, hidden size, attention heads, # layers, sequence length,
    tensor parallelism, data parallelism, pipeline parallelism, iteration time (ms)
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from ...errors import KernelDataError
from .mesh import Mesh
from .setup import Training
from .shape import TransformerShape

_COLUMNS = {
    "global batch": "batch", "micro batch": "samples", "hidden size": "hidden", "attention heads": "heads",
    "# layers": "layers", "sequence length": "sequence", "tensor parallelism": "tp", "data parallelism": "dp",
    "pipeline parallelism": "pp",
}  # fmt: skip
_TIME = "iteration time (ms)"
#: GPT-2's vocabulary, padded to a multiple of 128 for each tensor rank as Megatron-LM does.
VOCABULARY = 50257


@dataclass(frozen=True)
class MeasuredStep:
    """A training step and its measured seconds. ``line``: of the file, from 1 at the column names."""

    training: Training
    seconds: float
    file: str
    line: int


def read(path: Path, recompute: str) -> list[MeasuredStep]:
    """The rows of a file of Megatron-DeepSpeed's GPT runs (16 bits, 1F1B, written-out attention, gradients of 16 bits
    summed at the end). ``recompute``: what they repeat, which the file does not say. Raises KernelDataError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise KernelDataError(f"cannot read {path}: {error.strerror or error}", remedy="check the path") from error
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in (*_COLUMNS, _TIME) if name not in (reader.fieldnames or ())]
    if missing:
        raise KernelDataError(f"the column {missing[0]!r} is missing", where=str(path), remedy="see docs/cost_model.md")
    return [_row(row, number + 2, path, recompute) for number, row in enumerate(reader)]


def _row(row: dict[str, str], line: int, path: Path, recompute: str) -> MeasuredStep:
    try:
        size = {name: int(row[column]) for column, name in _COLUMNS.items()}
        seconds = float(row[_TIME]) * 1e-3
    except ValueError as error:
        raise KernelDataError(
            f"not a number: {error}", where=f"{path}, line {line}", remedy="correct the cell"
        ) from error
    padding = 128 * size["tp"]
    shape = TransformerShape(
        layers=size["layers"], hidden=size["hidden"], heads=size["heads"], feed_forward=4 * size["hidden"],
        vocabulary=-(-VOCABULARY // padding) * padding, sequence=size["sequence"], tied=True, dropout=True,
        positions=size["sequence"],
    )  # fmt: skip
    training = Training(
        shape, Mesh(dp=size["dp"], tp=size["tp"], pp=size["pp"]), samples=size["samples"],
        microbatches=max(1, size["batch"] // (size["dp"] * size["samples"])), recompute=recompute,
        sequence_parallel=False, dtype="f16", fused_attention=False, overlap=False, gradient=2,
        asynchronous_sums=False, fused_accumulation=False,
    )  # fmt: skip
    return MeasuredStep(training, seconds, path.name, line)
