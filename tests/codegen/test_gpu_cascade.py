"""The way of a fused cascade to a GPU, with its kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fresh_seed import fresh_random

pytest.importorskip("triton")

WORKER = Path(__file__).parent.parent / "gpu_cascade_worker.py"


def run(kind: str, folder: Path) -> dict[str, Any]:
    own = {"TRITON_INTERPRET": "1", "EFFCC_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    seed = str(fresh_random().randrange(2**31))
    done = subprocess.run(
        [sys.executable, str(WORKER), kind, seed], capture_output=True, text=True, env=os.environ | own, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_attention_on_a_gpu_trains_with_triton_kernels(tmp_path: Path) -> None:
    found = run("right", tmp_path)
    assert found["error"] < 1e-5
    assert found["why"] == ["", ""]
    assert found["kernels"] and all("@triton.jit" in source for source in found["kernels"])


@pytest.mark.slow
def test_a_kernel_that_gives_something_else_is_not_used(tmp_path: Path) -> None:
    """The first call is held to the Einsums as they are written."""
    found = run("wrong", tmp_path)
    assert found["error"] < 1e-5
    assert all("off by" in why for why in found["why"]) and len(found["why"]) == 2
