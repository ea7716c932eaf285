"""``effcc plan --mesh`` and ``effcc run --nproc`` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from effcc.cli_pipeline import parse_mesh
from effcc.errors import OptionError
from effcc.ir.plan_file import load_plan
from effcc.passes.pipeline_parallel.plan import from_plan, replicas_of
from subprocesses import environment

MODEL = """
import torch

class LM(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(97, 16), torch.nn.Linear(16, 97, bias=False)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)

model = LM
example_inputs = targets = (torch.arange(32).reshape(2, 16),)

def loss(logits, ids):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
"""


def run(folder: Path, *arguments: object) -> tuple[int, str, str]:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "effcc.cli", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=300, env=environment(folder),
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("text", ["4", "pp=", "pp=0", "pp=2,pp=2", "xy=2", ""])
def test_meshes_that_are_none(text: str) -> None:
    with pytest.raises(OptionError):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("axis", "remedy"),
    [("ep", "place-experts"), ("tp", "predict --mesh"), ("fsdp", "fully_shard"), ("cp", "predict --mesh")],
)
def test_axes_that_are_not_planned(axis: str, remedy: str) -> None:
    with pytest.raises(OptionError, match="the axes are pp and dp") as refused:
        parse_mesh(f"pp=2,{axis}=4")
    assert remedy in refused.value.remedy


def test_meshes() -> None:
    assert parse_mesh("pp=4") == (4, 1)
    assert parse_mesh("dp=2, pp=4") == (4, 2)
    assert parse_mesh("dp=3") == (1, 3)


@pytest.mark.slow
def test_plan_and_run(tmp_path: Path) -> None:
    (tmp_path / "lm.py").write_text(MODEL)
    code, out, err = run(
        tmp_path, "plan", "lm.py", "--mesh", "pp=2", "--microbatches", 4, "--device", "a100-80g", "--json"
    )
    assert code == 0, err
    facts = json.loads(out)
    assert facts["ranks"] == 2 and facts["microbatches"] == 4 and len(facts["peak"]) == 2
    assert 0 <= facts["gap"] < 1 and facts["bound"] <= facts["seconds"]
    assert run(tmp_path, "verify", "plan.effcc")[0] == 0
    code, out, err = run(tmp_path, "run", "plan.effcc", "lm.py", "--nproc", 2, "--rounds", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["predicted"]["seconds"] == facts["seconds"]
    first, second = found["ranks"]
    # Random weights: the loss of 97 words that are all equally likely.
    assert first["loss"] == second["loss"] == pytest.approx(4.6, abs=0.5)
    code, _, err = run(tmp_path, "run", "plan.effcc", "lm.py", "--nproc", 3)
    assert code == 2 and "the plan is for 2 ranks, not 3" in err
    (tmp_path / "lm.py").write_text(MODEL.replace("range(4)", "range(1)").replace("16, 97", "16, 96"))
    code, _, err = run(tmp_path, "run", "plan.effcc", "lm.py", "--nproc", 2)
    assert code == 2 and "a rank failed" in err


@pytest.mark.slow
def test_replicas(tmp_path: Path) -> None:
    """The plan has the steps of all ranks, the sums of gradients among them; the same loss as without replicas."""
    (tmp_path / "lm.py").write_text(MODEL)
    arguments = ("--microbatches", 4, "--device", "a100-80g", "--json")
    code, out, err = run(tmp_path, "plan", "lm.py", "--mesh", "pp=2,dp=2", *arguments)
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["ranks"], facts["replicas"]) == (2, 2) and facts["gradient_sums"] > 0
    assert run(tmp_path, "verify", "plan.effcc")[0] == 0
    plan = load_plan(tmp_path / "plan.effcc").plan
    sums = [step for step in plan.steps if step.stream == "replicas"]
    assert {step.device for step in sums} == {0, 1, 2, 3}
    assert replicas_of(plan) == 2 and from_plan(plan).ranks == 2
    for name in {step.name for step in sums}:  # each among the replicas of one rank
        members = {step.device for step in sums if step.name == name}
        assert members in ({0, 1}, {2, 3})
    code, out, _ = run(tmp_path, "plan", "lm.py", "--mesh", "pp=2", "-o", "single.effcc", *arguments)
    # Sums take their time, and none of it is bubble.
    assert code == 0 and json.loads(out)["seconds"] < facts["seconds"]
    code, out, err = run(tmp_path, "run", "plan.effcc", "lm.py", "--nproc", 4, "--rounds", 1, "--json")
    assert code == 0, err
    ranks = json.loads(out)["ranks"]
    assert [each["rank"] for each in ranks] == [0, 1, 2, 3]
    assert len({each["loss"] for each in ranks}) == 1
    code, out, err = run(tmp_path, "run", "single.effcc", "lm.py", "--nproc", 2, "--rounds", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["ranks"][0]["loss"] == pytest.approx(ranks[0]["loss"], rel=1e-6)
    code, _, err = run(tmp_path, "run", "plan.effcc", "lm.py", "--nproc", 2)
    assert code == 2 and "2 ranks of 2 replicas, not 2" in err and "--nproc 4" in err


FAULT = """
import os, signal, time
if os.environ.get("RANK") == "1":
    FAULT
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", ["rank 1 was killed by SIGKILL"]),
        ("time.sleep(20)", ["rank 0: ", "Ranks 1 failed to pass", "the start, where all ranks meet"]),
        ("LM.forward = lambda self, ids: self.head(self.table(ids).tanh().sin().cos())",
         ["the plan or model of rank 1 differs", "comparing the plan or model"]),
        ("raise ValueError('a fault of the file')", ["rank 1: ", "a fault of the file"]),
    ],
    ids=["killed", "slow", "mismatch", "raised"],
)  # fmt: skip
def test_faults_while_running(tmp_path: Path, fault: str, said: list[str]) -> None:
    (tmp_path / "lm.py").write_text(MODEL)
    arguments = ("--mesh", "pp=2", "--microbatches", 2, "--device", "a100-80g")
    assert run(tmp_path, "plan", "lm.py", *arguments)[0] == 0
    (tmp_path / "lm.py").write_text(MODEL + FAULT.replace("FAULT", fault))
    code, _, err = run(tmp_path, "run", "plan.effcc", "lm.py", "--nproc", 2, "--rank-limit", 5)
    assert code == 2 and "a rank failed" in err and "Traceback" not in err
    assert all(each in err for each in said), err


@pytest.mark.slow
def test_too_few_microbatches(tmp_path: Path) -> None:
    """Fewer than ranks: what runs in rounds is passed over, the rest has more bubble."""
    (tmp_path / "lm.py").write_text(MODEL)
    arguments = ("plan", "lm.py", "--mesh", "pp=4", "--device", "a100-80g", "--json", "--microbatches")
    code, out, err = run(tmp_path, *arguments, 1)
    assert code == 0, err
    few = json.loads(out)
    assert {"schedule": "interleaved", "seconds": None} in few["others"]
    code, out, _ = run(tmp_path, *arguments, 8)
    assert code == 0 and json.loads(out)["bubble"] < few["bubble"]
