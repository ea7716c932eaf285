"""CSV of measured pipelines: model shape, method, times of each stage; and, where it was measured, the iteration.

Columns (times per stage in microseconds, as many values as there are devices, separated by blanks)::

    method  vocabulary  sequence  hidden  ffn  layers  heads  pipeline_devices  microbatches  microbatch_size
    stage_forward_us  stage_backward_us
    stage_vocabulary_us        S and T together
    stage_vocabulary_small_us  the input embedding's forward (E)
    stage_communication_us     the input embedding's backward (D): it grows with the vocabulary, as no message does
    stage_input_us             a collective's time: equal on all ranks
    iteration_ms  peak_mb_measured  peak_mb_predicted    read in the calibration row alone
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from ...errors import PipelineDataError

METHODS = ("base", "redis", "vocab-1", "vocab-2", "interlaced")
_SIZES = {
    "vocabulary": "vocabulary", "sequence": "sequence", "hidden": "hidden", "ffn": "ffn", "layers": "layers",
    "heads": "heads", "pipeline_devices": "ranks", "microbatches": "microbatches",
    "microbatch_size": "microbatch_size",
}  # fmt: skip
_TIMES = {
    "stage_forward_us": "forward", "stage_backward_us": "backward", "stage_vocabulary_us": "output",
    "stage_vocabulary_small_us": "embedding", "stage_communication_us": "embedding_gradient",
    "stage_input_us": "collective",
}  # fmt: skip


@dataclass(frozen=True)
class StageTimes:
    """Seconds of each pass of a microbatch, per stage."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    output: tuple[float, ...]
    embedding: tuple[float, ...]
    embedding_gradient: tuple[float, ...]
    collective: tuple[float, ...]


@dataclass(frozen=True)
class PipelineRow:
    """One row. ``times`` is None where the row has no stage times."""

    number: int
    method: str
    vocabulary: int
    sequence: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    ranks: int
    microbatches: int
    microbatch_size: int
    times: StageTimes | None

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.sequence * self.microbatch_size

    @property
    def sharded(self) -> bool:
        """Whether the vocabulary layers are spread over all ranks."""
        return self.method not in ("base", "redis")


@dataclass(frozen=True)
class Measured:
    """What was measured of a whole iteration: seconds, and bytes on the rank that held most (None if not given)."""

    seconds: float
    peak: float | None


def read_rows(path: Path) -> tuple[PipelineRow, ...]:
    """All rows, without what was measured of the iteration. Raises PipelineDataError naming the line and column."""
    return tuple(_row(index, cells, path) for index, cells in enumerate(_cells(path)))


def read_measured(path: Path, row: int) -> Measured:
    """What was measured in row ``row``, counted from 0. Raises PipelineDataError if there is no such row or figure."""
    cells = _cells(path)
    if not 0 <= row < len(cells):
        raise PipelineDataError(
            f"there is no row {row} to calibrate on: the file has {len(cells)}",
            where=str(path),
            remedy="rows are counted from 0, without the header",
        )
    where = _place(path, row)
    seconds = _number(cells[row], "iteration_ms", where) / 1e3
    if seconds <= 0:
        raise PipelineDataError("iteration_ms is not positive", where=where, remedy="give the measured milliseconds")
    peak = cells[row].get("peak_mb_measured") or ""
    return Measured(seconds, _number(cells[row], "peak_mb_measured", where) * 2**20 if peak.strip() else None)


def _cells(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            names = reader.fieldnames or ()
            missing = [name for name in ("method", *_SIZES) if name not in names]
            if missing:
                raise PipelineDataError(
                    f"column {missing[0]} is missing", where=f"{path}, line 1",
                    remedy=f"the columns are method, {', '.join(_SIZES)}, {', '.join(_TIMES)}",
                )  # fmt: skip
            return [{name: cell for name, cell in row.items() if isinstance(name, str)} for row in reader]
    except OSError as error:
        raise PipelineDataError(
            f"cannot read the file: {error.strerror}", where=str(path), remedy="check the path"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise PipelineDataError(
            f"not a CSV file: {error}", where=str(path), remedy="save it as CSV in UTF-8"
        ) from error


def _row(index: int, cells: dict[str, str], path: Path) -> PipelineRow:
    where = _place(path, index)
    method = cells["method"].strip()
    if method not in METHODS:
        raise PipelineDataError(f"method {method!r} is unknown", where=where, remedy=f"one of {', '.join(METHODS)}")
    sizes = {}
    for column, field in _SIZES.items():
        number = _number(cells, column, where)
        if number < 1 or number != int(number):
            raise PipelineDataError(
                f"{column} is {cells[column]!r}", where=where, remedy="give a whole number from 1 on"
            )
        sizes[field] = int(number)
    if sizes["layers"] < sizes["ranks"]:
        raise PipelineDataError(
            f"{sizes['layers']} layers on {sizes['ranks']} devices", where=where, remedy="a stage needs a layer"
        )
    return PipelineRow(number=index, method=method, times=_times(cells, sizes["ranks"], where), **sizes)


def _times(cells: dict[str, str], ranks: int, where: str) -> StageTimes | None:
    if not (cells.get("stage_forward_us") or "").strip():
        return None
    found: dict[str, tuple[float, ...]] = {}
    for column, field in _TIMES.items():
        words = (cells.get(column) or "").split()
        if not words and field not in ("forward", "backward"):
            words = ["0"] * ranks
        try:
            values = tuple(float(word) / 1e6 for word in words)
        except ValueError as error:
            raise PipelineDataError(f"{column}: {error}", where=where, remedy="give microseconds") from error
        if len(values) != ranks or not all(0 <= value < float("inf") for value in values):
            raise PipelineDataError(
                f"{column} has {len(values)} values for {ranks} devices, or one that is no time",
                where=where,
                remedy="give one number of microseconds for each device, separated by blanks",
            )
        found[field] = values
    return StageTimes(**found)


def _number(cells: dict[str, str], column: str, where: str) -> float:
    try:
        return float(cells.get(column) or "")
    except ValueError as error:
        raise PipelineDataError(
            f"{column} is {cells.get(column)!r}, which is no number", where=where, remedy="give a number"
        ) from error


def _place(path: Path, index: int) -> str:
    return f"{path}, line {index + 2}"
