"""Triton kernels, run by Triton's interpreter in another process: the switch for it is read when Triton is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from subprocesses import environment

pytest.importorskip("triton")
from triton_interpreted import CHECKS

SCRIPT = Path(__file__).resolve().parent.parent / "triton_interpreted.py"
_QUICK = (
    "f64, causal",
    "f64, window",
    "f64, backward, causal",
    "bf16, causal",
    "group, causal",
    "known, linear and cross-entropy",
    "in parts, vanilla",
    "rows that are masked altogether",
    "NaN and infinity",
    "strides",
)
#: Checks that share a process, so that each has a time to itself of no more than a minute or so.
_GROUPED = 12


def tolerance(name: str) -> float:
    """Of the largest number: rounding of the sums in float64 and float32; one rounding of the output and of the weights
    in bfloat16 and float16."""
    if name.startswith(("bf16", "f16")):
        return 2e-2 if name.startswith("bf16") else 3e-3
    if name.startswith("f32") or name == "rows that are masked altogether":
        return 2e-5 if "alibi" in name else 3e-6
    return 1e-9


def interpreted(names: list[str], cache: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *names],
        env=environment(cache, {"TRITON_INTERPRET": "1"}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return interpreted(list(_QUICK), tmp_path_factory.mktemp("triton"))


def check(name: str, found: Any) -> None:
    assert isinstance(found, float | int), found
    assert found <= tolerance(name)


@pytest.mark.parametrize("name", _QUICK)
def test_quick(name: str, quick: dict[str, Any]) -> None:
    check(name, quick[name])


_REST = [name for name in CHECKS if name not in _QUICK]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(_REST), _GROUPED))
def test_all(first: int, tmp_path: Path) -> None:
    names = _REST[first : first + _GROUPED]
    found = interpreted(names, tmp_path)
    wrong = {name: found[name] for name in names if not isinstance(found[name], float | int)}
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())
    for name in names:
        check(name, found[name])
