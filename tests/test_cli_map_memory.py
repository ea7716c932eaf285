"""``effcc map-memory`` as a user calls it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from effcc.ir.mapping_validator import validate_mapping

FOUR = "id,lower,upper,size,note\na,0,4,3,x\nb,2,6,2,y\nc,4,8,3,\nd,6,9,1,z\n"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "effcc.cli", "map-memory", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def four(tmp_path: Path) -> Path:
    path = tmp_path / "four.csv"
    path.write_text(FOUR)
    return path


def test_writes_the_rows_with_offsets(four: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    done = run(four, "--capacity", 5, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert set(facts) == {"height", "lower_bound", "gap", "status", "seconds", "seed"}
    assert (facts["height"], facts["lower_bound"], facts["gap"], facts["status"]) == (5, 5, 0.0, "optimal")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "lower", "upper", "size", "note", "offset"]
    assert [{k: v for k, v in row.items() if k != "offset"} for row in rows] == list(csv.DictReader(FOUR.splitlines()))
    validate_mapping(rows, 5)


def test_too_small_a_capacity(four: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    done = run(four, "--capacity", 4, "-o", out, "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["status"] == "infeasible"
    with out.open(newline="") as file:
        validate_mapping(list(csv.DictReader(file)))


def test_several_files(four: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("id,lower,upper,size\n")
    (tmp_path / "maps").mkdir()
    done = run(four, other, "-o", tmp_path / "maps", "--json")
    assert done.returncode == 0, done.stderr
    assert [(Path(each["file"]).name, each["height"]) for each in json.loads(done.stdout)] == [
        ("four.csv", 5),
        ("other.csv", 0),
    ]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["four.csv", "other.csv"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.csv"], "missing.csv"),
        (["four.csv", "--capacity", 5, "--minimize"], "exclude each other"),
        (["four.csv", "four.csv", "-o", "nowhere"], "not a folder"),
        (["four.csv", "-o", "four.csv"], "replace the input"),
        (["bad.csv"], "bad.csv, line 2"),
        (["four.csv", "--time-limit", -1], "time-limit"),
    ],
)
def test_bad_input(arguments: list[object], said: str, four: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("id,lower,upper,size\na,0,1,many\n")
    words = [tmp_path / each if isinstance(each, str) and not each.startswith("-") else each for each in arguments]
    done = run(*words)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr
    assert four.read_text() == FOUR


def test_torch_is_not_imported() -> None:
    code = "import sys, effcc.cli, effcc.cli_map_memory, effcc.cost_model.offset_assignment.improvement; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
