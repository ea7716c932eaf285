"""``effcc plan --mesh`` and ``effcc run --nproc`` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from effcc.cli_pipeline import device_on_nodes, plan_pipeline
from effcc.errors import OptionError
from effcc.ir.plan_file import load_plan
from effcc.passes.pipeline_parallel import torch_csv
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


TRANSFORMER = """
import torch
import transformers

def model():
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)

ids = torch.arange(32).reshape(2, 16)
example_inputs = {"input_ids": ids, "labels": ids}
"""


def run(folder: Path, *arguments: object) -> tuple[int, str, str]:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "effcc.cli", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=300, env=environment(folder),
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("mesh", "nodes", "said"),
    [("xy=2", None, "unknown axis"), ("pp=2,pp=2", None, "not understood"), ("pp=3", 2, "does not divide 3 ranks")],
)
def test_meshes_that_are_none(tmp_path: Path, mesh: str, nodes: int | None, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        plan_pipeline("none.py", mesh, 4, "a100-80g", None, None, tmp_path / "plan.effcc", nodes, True)


def test_nodes() -> None:
    """A mesh over two nodes has half its ranks on each."""
    assert next(link for link in device_on_nodes("a100-80g", 8, 2).links if link.scope == "node").devices == 4
    assert device_on_nodes("a100-80g", 8, None).name == "a100-80g"


AXES = [
    ("pp=2,tp=2", {"tensor"}), ("cp=2", {"context"}), ("pp=2,fsdp=2,dp=2", {"parameters"}),
    ("pp=2,cp=2,tp=2", {"tensor", "context"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "streams"), AXES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_axis(tmp_path: Path, mesh: str, streams: set[str]) -> None:
    """Steps for every rank, with the exchanges of each axis on its stream; less memory a rank than without."""
    (tmp_path / "gpt.py").write_text(TRANSFORMER)
    arguments = ("--microbatches", 4, "--device", "a100-80g", "--json")
    stages = "pp=2" if "pp=2" in mesh else "pp=1"
    code, out, err = run(tmp_path, "plan", "gpt.py", "--mesh", stages, *arguments)
    assert code == 0, err
    alone = json.loads(out)
    code, out, err = run(tmp_path, "plan", "gpt.py", "--mesh", mesh, *arguments)
    assert code == 0, err
    facts = json.loads(out)
    assert set(facts["collectives"]) == streams and all(seconds > 0 for seconds in facts["collectives"].values())
    assert 0 <= facts["bound"] <= facts["seconds"] and max(facts["peak"]) < max(alone["peak"])
    assert facts["context"] in (("ring", "tree") if "context" in streams else ("",))
    assert run(tmp_path, "verify", "plan.effcc")[0] == 0
    plan = load_plan(tmp_path / "plan.effcc").plan
    everyone = facts["ranks"] * facts["replicas"]
    for stream in streams:
        assert {step.device for step in plan.steps if step.stream == stream} == set(range(everyone))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "said"),
    [("tp=3", "tp=3 does not divide"), ("ep=2,dp=2", "no experts"), ("cp=3", "do not divide a sequence")],
)
def test_axes_that_do_not_fit(tmp_path: Path, mesh: str, said: str) -> None:
    (tmp_path / "gpt.py").write_text(TRANSFORMER)
    code, _, err = run(tmp_path, "plan", "gpt.py", "--mesh", mesh, "--device", "a100-80g")
    assert code == 2 and said in err, err


@pytest.mark.slow
def test_sequences_are_split(tmp_path: Path) -> None:
    """The same loss as in one process; on a pipeline of two stages with two ranks for each sequence."""
    (tmp_path / "gpt.py").write_text(TRANSFORMER)
    found = {}
    for name, mesh, count in (("whole", "pp=1", 1), ("split", "pp=2,cp=2", 4), ("sharded", "fsdp=2", 2)):
        arguments = ("--mesh", mesh, "--microbatches", 2, "--device", "a100-80g", "-o", f"{name}.effcc")
        code, _, err = run(tmp_path, "plan", "gpt.py", *arguments)
        assert code == 0, err
        code, out, err = run(tmp_path, "run", f"{name}.effcc", "gpt.py", "--nproc", count, "--rounds", 1, "--json")
        assert code == 0, err
        found[name] = {each["loss"] for each in json.loads(out)["ranks"]}
    (whole,) = found["whole"]
    for name in ("split", "sharded"):
        (loss,) = found[name]
        assert loss == pytest.approx(whole, rel=1e-6)


LLAMA = TRANSFORMER.replace("GPT2LMHeadModel", "LlamaForCausalLM").replace(
    """GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,""",
    """LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=None,""",
)


@pytest.mark.slow
def test_tensors_are_shared(tmp_path: Path) -> None:
    """By DTensor, where products are nn.Linear; what torch has no style for is refused."""
    (tmp_path / "llama.py").write_text(LLAMA)
    (tmp_path / "gpt.py").write_text(TRANSFORMER)
    losses = []
    for mesh, count in (("pp=1", 1), ("tp=2", 2), ("tp=2,fsdp=2", 4)):
        arguments = ("--mesh", mesh, "--microbatches", 2, "--device", "a100-80g")
        code, _, err = run(tmp_path, "plan", "llama.py", *arguments)
        assert code == 0, err
        code, out, err = run(tmp_path, "run", "plan.effcc", "llama.py", "--nproc", count, "--rounds", 1, "--json")
        assert code == 0, err
        losses += [each["loss"] for each in json.loads(out)["ranks"]]
    assert losses == pytest.approx([losses[0]] * 7, rel=1e-5)
    code, _, err = run(tmp_path, "plan", "gpt.py", "--mesh", "tp=2", "--device", "a100-80g")
    assert code == 0, err
    code, _, err = run(tmp_path, "run", "plan.effcc", "gpt.py", "--nproc", 2, "--rounds", 1)
    assert code == 2 and "no style for Conv1D" in err, err
    code, _, err = run(tmp_path, "plan", "llama.py", "--mesh", "pp=2,tp=2", "--device", "a100-80g")
    assert code == 0, err
    code, _, err = run(tmp_path, "run", "plan.effcc", "llama.py", "--nproc", 4)
    assert code == 2 and "tp and fsdp are run without pp and cp" in err


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
    code, out, err = run(tmp_path, "export", "plan.effcc", "--to", "torch-csv")
    assert code == 0 and out.strip() == "plan.csv", err
    kind = facts["vocabulary"] if "barrier" in facts["vocabulary"] else ""
    exported = torch_csv.from_csv((tmp_path / "plan.csv").read_text(), vocabulary=kind)
    assert exported.ranks == 2 and exported.microbatches == 4 and exported.stages == facts["stages"]
    code, out, err = run(tmp_path, "run", "plan.effcc", "lm.py", "--nproc", 2, "--rounds", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["predicted"]["seconds"] == facts["seconds"]
    first, second = found["ranks"]
    # Random weights: the loss of 97 words that are all equally likely.
    assert first["loss"] == second["loss"] == pytest.approx(4.6, abs=0.5)
    code, out, err = run(
        tmp_path, "plan", "lm.py", "--mesh", "pp=2", "--schedule", "zb-v", "--device", "a100-80g", "-o", "v.effcc",
        "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["schedule"] == "zb-v", err
    code, _, err = run(tmp_path, "plan", "lm.py", "--mesh", "pp=2", "--schedule", "2f2b", "--device", "a100-80g")
    assert code == 2 and "2f2b" in err and "some of gpipe" in err
    code, _, err = run(tmp_path, "run", "plan.effcc", "lm.py", "--nproc", 3)
    assert code == 2 and "the plan is for 2 ranks (pp=2), not 3" in err
    (tmp_path / "lm.py").write_text(MODEL.replace("range(4)", "range(1)").replace("16, 97", "16, 96"))
    code, _, err = run(tmp_path, "run", "plan.effcc", "lm.py", "--nproc", 2)
    assert code == 2 and "a rank failed" in err and "made for another model" in err


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
    assert code == 2 and "the plan is for 4 ranks (dp=2,pp=2), not 2" in err and "--nproc 4" in err


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
