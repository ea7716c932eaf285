"""What goes wrong in a step on several ranks ends every process within a time limit, with a message that names rank and
step: in pipelines, in sequences that ranks share, in steps that torch shards.

Real processes over gloo.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from effcc.errors import PipelineError
from effcc.runtime.process_group import join_group
from pipeline_fault_worker import LIMIT, SLOW
from subprocesses import rank_variables, start

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

#: Seconds from the begin of an attempt within which each rank has its message: the limit, or the slow rank's own pace,
#: and what ranks give each other to answer an alarm. Machines with other work on them get twice that.
ENDS = 2 * (LIMIT + SLOW + 5.0)


def ended(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each. Fails for one that does not end."""
    found = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=seconds)
            found.append((process.returncode, output, errors))
    except subprocess.TimeoutExpired:
        pytest.fail("a rank did not end")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


def messages(
    cache: Path, ranks: int, faults: list[str], what: str = "pipeline", how: Any = 1
) -> dict[int, dict[str, str]]:
    """rank -> fault -> message, of the ranks that lived to tell."""
    code = f"import pipeline_fault_worker as worker; worker.run({faults!r}, {what!r}, {how!r})"
    processes = [start(code, cache, variables) for variables in rank_variables(ranks)]
    found: dict[int, dict[str, str]] = {}
    for code_, output, errors in ended(processes, 240):
        if code_ == 0:
            told: Any = json.loads(output.splitlines()[-1])
            found[told["rank"]] = {fault: message for fault, (message, _) in told["found"].items()}
            assert all(seconds < ENDS for _, seconds in told["found"].values()), told
        else:
            assert code_ == -9, errors[-3000:]  # the one that was killed
    return found


@pytest.mark.slow
def test_faults_of_ranks(tmp_path: Path) -> None:
    """Three ranks, of which the last is at fault: the first does not talk with it, and blames it all the same."""
    found = messages(tmp_path, 3, ["world", "mismatch", "few", "raised", "slow", "killed"])
    assert sorted(found) == [0, 1]
    for rank, said in found.items():
        assert "the schedule is for 4 ranks, 3 are running" in said["world"] and f"rank {rank}" in said["world"]
        assert f"rank {rank}: the plan or model of rank 2 differs" in said["mismatch"]
        assert "comparing the plan or model" in said["mismatch"]
        assert "rank 2 failed at the begin of a step: the schedule has 4 microbatches, the batch 3" in said["few"]
        assert "rank 2 failed at pass 2F1: ValueError: a fault of this rank's own" in said["raised"]
        assert "rank 2 was still at pass 2F1" in said["slow"] and "3 s" in said["slow"]
        assert "rank 2 did not answer: it has ended, or was killed" in said["killed"]
        for fault in ("few", "raised", "slow", "killed"):
            assert f"at pass {rank}" in said[fault]  # where this rank waited


@pytest.mark.slow
def test_faults_of_replicas(tmp_path: Path) -> None:
    """Two replicas of two ranks: the rank at fault is named in its own replica and in the other."""
    found = messages(tmp_path, 4, ["few", "raised", "slow", "killed"], how=2)
    assert sorted(found) == [0, 1, 2]
    for said in found.values():
        assert "rank 3 failed at the begin of a step" in said["few"]
        assert "rank 3 failed at pass 1F1: ValueError" in said["raised"]
        assert "rank 3 was still at pass 1F1" in said["slow"]
        assert "rank 3 did not answer" in said["killed"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ring", "tree"])
def test_faults_within_an_attention(tmp_path: Path, form: str) -> None:
    """Three ranks share a sequence; the last is at fault after its first exchange of the first attention."""
    found = messages(tmp_path, 3, ["mismatch", "raised", "slow", "killed"], "sequence", form)
    assert sorted(found) == [0, 1]
    waits = "handed on" if form == "ring" else "merging states"
    for rank, said in found.items():
        assert f"rank {rank}: the plan or model of rank 2 differs" in said["mismatch"]
        assert "rank 2 failed at pass 0F0: ValueError: a fault of this rank's own" in said["raised"]
        assert "rank 2 was still at pass 0F0" in said["slow"] and "3 s" in said["slow"]
        assert "rank 2 did not answer: it has ended, or was killed" in said["killed"]
        for fault in ("raised", "slow", "killed"):
            assert "at pass 0F0" in said[fault] and waits in said[fault], said[fault]


#: What one set of processes goes through: DTensor keeps the groups of an equal mesh, which a fault has broken.
SHARDED = {
    "fsdp": [["mismatch", "raised", "slow", "slow backward", "killed"]],
    "tp": [["mismatch", "raised"], ["slow"], ["killed"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("axis", list(SHARDED))
def test_faults_of_sharded_steps(tmp_path: Path, axis: str) -> None:
    """Ranks share parameters; the last one is at fault in a layer's forward, or when its gradient comes."""
    ranks = {"fsdp": 3, "tp": 2}[axis]
    last, forward = ranks - 1, "the forward of model.layers.1"
    wanted = {
        "mismatch": f"the plan or model of rank {last} differs",
        "raised": f"rank {last} failed at {forward}, microbatch 1: ValueError",
        "slow": f"rank {last} was still at {forward}, microbatch 1",
        "slow backward": f"rank {last} was still at the backward of model.layers.1",
        "killed": f"rank {last} did not answer: it has ended, or was killed",
    }
    for faults in SHARDED[axis]:
        found = messages(tmp_path, ranks, faults, "sharded", axis)
        # The one that was killed says nothing.
        assert sorted(found) == list(range(ranks - ("killed" in faults)))
        for rank in range(last):
            for fault in faults:
                assert wanted[fault] in found[rank][fault], found[rank][fault]


@pytest.mark.slow
def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    """It is slow before it has said anything: the first rank knows who is missing, the others refer to it."""
    found = messages(tmp_path, 3, ["late"])
    assert sorted(found) == [0, 1, 2]
    assert "Ranks 2 failed to pass" in found[0]["late"]
    assert "check rank 0" in found[1]["late"]
    assert all("the start, where all ranks meet" in said["late"] for said in found.values())


JOIN = """
from effcc.errors import EffccError
from effcc.runtime.process_group import join_group
import os
try:
    join_group(limit=2)
except EffccError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_joining(tmp_path: Path) -> None:
    """A port that another program has; a process that does not come; a first rank that is nowhere."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = [each | {"MASTER_PORT": str(other.getsockname()[1])} for each in rank_variables(2)]
        alone, orphan = rank_variables(2)[0], rank_variables(2)[1]
        begin = time.monotonic()
        processes = [start(JOIN, tmp_path, variables) for variables in (*taken, alone, orphan)]
        said = [output for _, output, _ in ended(processes, 120)]
    assert "rank 0 cannot listen at 127.0.0.1" in said[0] and "the port is taken" in said[0]
    assert "rank 1 finds no group at 127.0.0.1" in said[1]
    assert "rank 0 could not join its group within 2 s" in said[2] and "1/2 clients" in said[2]
    assert "rank 1 finds no group at 127.0.0.1" in said[3]
    assert all("joining the group" in each for each in said)
    assert time.monotonic() - begin < 110


def test_a_variable_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PipelineError, match="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"):
        join_group()
