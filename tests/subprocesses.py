"""Python processes of their own, for tests of what a process inherits or does not survive."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: A training step of a small model; prints one line of JSON: largest distance from eager, and what effcc reports.
STEP = """
import copy, json, sys, warnings
warnings.simplefilter("ignore")
import torch
import effcc
from models import Tower

def step(width=8, backend="effcc"):
    torch.manual_seed(0)
    plain = Tower(width, depth=1).double()
    model = copy.deepcopy(plain)
    x = torch.randn(5, width, dtype=torch.float64)
    found = torch.compile(model, backend=backend)(x)
    wanted = plain(x)
    found.square().sum().backward()
    wanted.square().sum().backward()
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters()))]
    return max((a - b).abs().max().item() for a, b in pairs)

def tell(**more):
    reports = effcc.reports()
    print(json.dumps({
        "graphs": len(reports),
        "kernels": sum(report.kernels for report in reports),
        "fallbacks": [item.reason for report in reports for item in report.fallbacks],
    } | more))
"""


def environment(cache: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables, with cold caches under ``cache`` and the tests' helpers importable."""
    return os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "EFFCC_CACHE_DIR": str(cache / "effcc"),
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
        **(more or {}),
    }


def start(code: str, cache: Path, more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(cache, more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(processes: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[Any]:
    """The last line of each process's output, read as JSON. Fails for a process that hangs or fails."""
    found = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, f"exit code {process.returncode}\n{output}\n{errors[-4000:]}"
            found.append(json.loads(output.splitlines()[-1]) | {"stderr": errors})
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


def run(code: str, cache: Path, more: Mapping[str, str] | None = None) -> Any:
    return results([start(code, cache, more)])[0]


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """What torch.distributed reads in each of so many processes on this machine, at a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [common | {"RANK": str(rank)} for rank in range(ranks)]


def run_ranks(code: str, cache: Path, ranks: int, seconds: float = 300) -> list[Any]:
    """``code`` in so many processes of one torch.distributed group; the results of each."""
    return results([start(code, cache, variables) for variables in rank_variables(ranks)], seconds)
