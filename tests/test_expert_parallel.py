"""Expert-parallel execution over gloo, beside the same model in one process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from fresh_seed import fresh_random
from subprocesses import rank_variables, run_ranks, start

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

#: The models compute norms and routing weights in float32 whatever their parameters are: rounding of float64 before
#: that may move a value to its neighbour.
ROUNDED = 1e-6


def worker(call: str, cache: Path, ranks: int) -> list[Any]:
    return run_ranks(f"import expert_parallel_worker as worker; worker.{call}", cache, ranks)


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, [("mixtral", 2, "home", 8), ("qwen3", 1, "coherent", 8)]),
        pytest.param(
            2,
            [("qwen3", 3, "auto", 8), ("mixtral", 1, "home", 12), ("mixtral", 2, "coherent", 12)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            [("qwen3", 2, "home", 12), ("qwen3", 2, "coherent", 16), ("mixtral", 1, "coherent", 8)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_equal_to_one_process(tmp_path: Path, ranks: int, cases: list[tuple[str, int, str, int]]) -> None:
    seed = fresh_random().getrandbits(20)
    for rank in worker(f"equalities({cases!r}, {seed})", tmp_path, ranks):
        assert len(rank["cases"]) == len(cases)
        for each in rank["cases"]:
            assert each["outputs"] < ROUNDED and each["gradients"] < ROUNDED, each
            if each["mode"] == "coherent":
                # two forwards of three layers: keys and values, one exchange (two if k > 1), and the way home
                assert each["exchanges"] == 2 * (3 * (2 if each["k"] == 1 else 3) + 1)
            if each["mode"] == "home":
                assert each["exchanges"] == 2 * 3  # there and back along one route


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "k", "mode", "width"), [("mixtral", 2, "home", 8), ("qwen3", 2, "home", 12), ("qwen3", 1, "coherent", 8)]
)
def test_replicas(tmp_path: Path, kind: str, k: int, mode: str, width: int) -> None:
    """A mesh ep=2, dp=2: each process has its own sequences, the gradients are those of all of them."""
    for rank in worker(f"replicated({kind!r}, {k}, {mode!r}, {width}, {fresh_random().getrandbits(20)})", tmp_path, 4):
        assert rank["outputs"] < ROUNDED and rank["gradients"] < ROUNDED, rank


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_bytes_are_as_predicted(tmp_path: Path, k: int) -> None:
    """On inputs that the prediction has not seen, the bytes themselves and their fall from one placement to another."""
    import numpy as np
    from effcc.cost_model.expert_placement.baselines import round_robin
    from effcc.cost_model.expert_placement.problem import Problem, Weights
    from effcc.cost_model.expert_placement.routing import Trace, count
    from effcc.cost_model.expert_placement.solver import solve
    from effcc.frontend.expert_trace import record_routing
    from expert_parallel_worker import EXPERTS, VOCABULARY, moe

    seed = fresh_random().getrandbits(20)
    ids = torch.randint(0, VOCABULARY, (600, 12), generator=torch.Generator().manual_seed(seed + 1))
    recorded = record_routing(moe("qwen3", k, 64), [((), {"input_ids": ids})])
    routing = count(Trace(recorded.token, recorded.layer, recorded.slot, recorded.expert, EXPERTS))
    problem = Problem(routing.loads, routing.transitions, 2, weights=Weights(load=0.0))
    plain, placed = round_robin(problem), solve(problem, time_limit=5).slots
    ranks = worker(f"measured_bytes('qwen3', {k}, {seed}, {[plain.tolist(), placed.tolist()]})", tmp_path, 2)
    sent = np.array([[row["sent"] for row in each["rows"]] for each in ranks]).sum(axis=0)
    predicted = np.array([row["predicted"] for row in ranks[0]["rows"]])
    print(sent, predicted)
    assert (np.abs(sent - predicted) <= 0.05 * predicted).all()
    fall, predicted_fall = sent[1] / sent[3], predicted[1] / predicted[3]
    assert abs(fall - predicted_fall) <= 0.05 * predicted_fall


@pytest.mark.parametrize(
    ("what", "ranks", "said"),
    [
        pytest.param("killed", 3, "rank 2 did not answer", marks=pytest.mark.slow),
        pytest.param("slow", 2, "rank 1 was still at", marks=pytest.mark.slow),
        pytest.param("mismatch", 3, "of rank 1 differs", marks=pytest.mark.slow),
        pytest.param("world", 2, "for 3 ranks, the group has 2", marks=pytest.mark.slow),
        pytest.param("indivisible", 2, "7 slots do not divide among 2 ranks", marks=pytest.mark.slow),
    ],
)
def test_faults_end_all_ranks_and_name_the_one(tmp_path: Path, what: str, ranks: int, said: str) -> None:
    code = f"import expert_parallel_worker as worker; worker.fault({what!r})"
    processes = [start(code, tmp_path, variables) for variables in rank_variables(ranks)]
    found = {}
    try:
        for process in processes:
            output, errors = process.communicate(timeout=120)
            for line in output.splitlines():
                if line.startswith("{"):
                    told = json.loads(line)
                    found[told["rank"]] = told["error"]
            assert "Traceback" not in errors, errors[-2000:]
    except subprocess.TimeoutExpired:
        pytest.fail("a rank did not end")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    living = ranks - 1 if what in ("killed", "slow") else ranks
    for rank in range(living):
        assert said in found[rank], found
        if what in ("killed", "slow"):
            assert "layers.1.mlp" in found[rank], found
