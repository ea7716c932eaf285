"""``effcc plan --mesh`` and ``effcc run --nproc`` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from effcc.cli_pipeline import parse_mesh
from effcc.errors import OptionError
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


@pytest.mark.parametrize("text", ["4", "pp=", "pp=0", "pp=2,pp=2", "dp=2", "pp=2,ep=4", ""])
def test_meshes_that_are_none(text: str) -> None:
    with pytest.raises(OptionError):
        parse_mesh(text)
    assert parse_mesh("pp=4") == 4


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
