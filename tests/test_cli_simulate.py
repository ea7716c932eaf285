"""``effcc simulate pipeline``: the published measurements of eight A100s, and files that are wrong."""

from __future__ import annotations

import csv
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEADER = (
    "method,vocabulary,sequence,hidden,ffn,layers,heads,pipeline_devices,microbatches,microbatch_size,iteration_ms,"
    "peak_mb_predicted,peak_mb_measured,stage_forward_us,stage_backward_us,stage_vocabulary_us,"
    "stage_vocabulary_small_us,stage_communication_us,stage_input_us"
)
#: A made-up pair: two stages of 10 and 20 ms, and 4 microbatches.
ROW = "base,32000,2048,1024,4096,8,16,2,4,1,,,,10000 10000,20000 20000,0 0,0 0,0 0,0 0"
#: Mean errors that are asked for, percent.
WANTED = {"base": 1.0, "redis": 1.0, "vocab-1": 1.5, "vocab-2": 1.5, "interlaced": 2.0}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "effcc.cli", "simulate", "pipeline", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def simulated(*arguments: object) -> list[dict[str, Any]]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def published() -> Path:
    folder = os.environ.get("EFFCC_BENCH_DATA")
    path = Path(folder or "") / "pipeline" / "vocabulary_parallel_seq2048.csv"
    if not folder or not path.exists():
        pytest.skip("EFFCC_BENCH_DATA has no pipeline/vocabulary_parallel_seq2048.csv")
    return path


@pytest.fixture(scope="module")
def predictions(published: Path) -> list[dict[str, Any]]:
    return simulated(published)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def errors(found: list[dict[str, Any]], rows: list[dict[str, str]], key: str, column: str) -> list[float]:
    return [each[key] / float(row[column]) - 1 for each, row in zip(found, rows, strict=True)]


def test_published_measurements(published: Path, predictions: list[dict[str, Any]]) -> None:
    rows, found = rows_of(published), predictions
    assert [(each["row"], each["method"], each["vocabulary"]) for each in found] == [
        (index, row["method"], int(row["vocabulary"])) for index, row in enumerate(rows)
    ]
    assert set(found[0]) == {"row", "method", "vocabulary", "iteration_ms", "peak_mb", "bubble"}
    off = errors(found, rows, "iteration_ms", "iteration_ms")
    for method, most in WANTED.items():
        mine = [abs(each) for each, row in zip(off, rows, strict=True) if row["method"] == method]
        assert 100 * statistics.fmean(mine) <= most, method
    assert max(map(abs, errors(found, rows, "peak_mb", "peak_mb_measured"))) <= 0.05
    # The table's ratios: throughput of the vocabulary methods over the better of the two baselines.
    for vocabulary in {row["vocabulary"] for row in rows}:
        times = {row["method"]: (float(row["iteration_ms"]), each["iteration_ms"])
                 for row, each in zip(rows, found, strict=True) if row["vocabulary"] == vocabulary}  # fmt: skip
        for method in ("vocab-1", "vocab-2"):
            measured, predicted = (times["redis"][at] / times[method][at] for at in (0, 1))
            assert predicted == pytest.approx(measured, rel=0.02)


def test_measured_columns_are_not_read(published: Path, predictions: list[dict[str, Any]], tmp_path: Path) -> None:
    blank = [row | {"iteration_ms": "", "peak_mb_measured": "", "peak_mb_predicted": "?"} for row in rows_of(published)]
    assert simulated(write(tmp_path / "blank.csv", blank)) == predictions


def test_calibrated_on_one_row(published: Path, tmp_path: Path) -> None:
    """The other rows' stage times and measurements are not there at all."""
    rows = rows_of(published)
    number = random.SystemRandom().randrange(len(rows))
    print(f"calibration row {number}")
    nothing = {name: "" for name in rows[0] if name.startswith(("stage_", "iteration_", "peak_"))}
    bare = [row if index == number else row | nothing for index, row in enumerate(rows)]
    found = simulated(write(tmp_path / "bare.csv", bare), "--calibrate-row", number)
    off = [abs(each) for each in errors(found, rows, "iteration_ms", "iteration_ms")]
    # Where the stage times alone take longer than the iteration did, no exchange explains it.
    own = errors(found, rows, "iteration_ms", "iteration_ms")[number]
    assert abs(own) < 1e-3 or (rows[number]["method"] not in ("base", "redis") and 0 < own < 0.01)
    assert 100 * statistics.fmean(off) <= 3
    assert max(map(abs, errors(found, rows, "peak_mb", "peak_mb_measured"))) <= 0.05


def test_without_data(tmp_path: Path) -> None:
    """Two stages of 10 and 20 ms: (4 + 2 - 1) * 30 ms, and the exchange and optimizer besides."""
    path = tmp_path / "two.csv"
    path.write_text(f"{HEADER}\n{ROW}\n")
    (found,) = simulated(path)
    assert 150 < found["iteration_ms"] < 160
    assert found["bubble"] == pytest.approx((2 - 1) / (4 + 2 - 1), rel=0.05)
    assert "live microbatches" in run(path).stdout


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (None, [], "cannot read"),
        ("method,vocabulary\nbase,1\n", [], "column sequence is missing"),
        (f"{HEADER}\n{ROW.replace('base', 'gpipe')}\n", [], "method 'gpipe' is unknown"),
        (f"{HEADER}\n{ROW.replace('10000 10000', '10000')}\n", [], "1 values for 2 devices"),
        (f"{HEADER}\n{ROW.replace('10000 10000', '10000 nan')}\n", [], "no time"),
        (f"{HEADER}\n{ROW.replace('10000 10000', '')}\n", [], "--calibrate-row"),
        (f"{HEADER}\n{ROW.replace(',8,16,', ',1,16,')}\n", [], "1 layers on 2 devices"),
        (f"{HEADER}\n{ROW}\n", ["--calibrate-row", 1], "no row 1"),
        (f"{HEADER}\n{ROW}\n", ["--calibrate-row", 0], "iteration_ms"),
        (f"{HEADER}\n{ROW}\n", ["--device", "a1000"], "unknown device"),
    ],
)
def test_bad_input(text: str | None, arguments: list[object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    if text is not None:
        path.write_text(text)
    done = run(path, *arguments)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr and "Traceback" not in done.stderr
