"""``effcc place-experts`` and ``effcc trace-experts`` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from effcc.cost_model.expert_placement.routing import from_choices, read_routing, write_trace
from effcc.ir.placement_validator import validate_placement
from expert_routing import planted, walk

EPLB = "90,132,40,61,104,165,39,4,73,56,183,86\n20,107,104,64,19,197,187,157,172,86,16,27\n"
MODEL = """
import torch

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(8, 6)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        index = self.router(x).topk(2, dim=-1)[1]
        print("from the model")
        return x + sum((index == e).any(-1, keepdim=True) * expert(x) for e, expert in enumerate(self.experts))

def model():
    return torch.nn.Sequential(Block(), torch.nn.Tanh(), Block())

def example_inputs():
    return (torch.randn(10, 8),)

plain = torch.nn.Linear(8, 8)
"""


def run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "effcc.cli", command, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """8 experts, 3 layers, 300 tokens, two experts a token."""
    generator = np.random.default_rng(7)
    first, steps, _ = planted(generator, 8, 3, 4, 0.7)
    path = tmp_path / "trace.csv"
    path.write_bytes(write_trace(from_choices(walk(generator, first, steps, 300, 2)), path))
    return path


def test_trace_to_placement_and_on(trace: Path, tmp_path: Path) -> None:
    """Placed from CSV, again from npz, and with the first as the placement in use."""
    done = run("place-experts", trace, "--ranks", 4, "--nodes", 2, "--time-limit", 1.5, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    keys = {"layers", "hops", "migrated", "objective", "bound", "gap", "seconds", "status"}
    assert set(found) == keys and set(found["hops"]) == {"device", "node"}
    assert [set(layer) for layer in found["layers"]] == [{"slots", "max_over_mean"}] * 3
    routing = read_routing(trace)
    validate_placement(found, routing.loads.tolist(), routing.transitions.tolist(), 4, 2)
    used = tmp_path / "used.json"
    used.write_text(done.stdout)
    table = np.loadtxt(trace, delimiter=",", skiprows=1, dtype=np.int64)
    np.savez(tmp_path / "trace.npz", **dict(zip(("token", "layer", "slot", "expert"), table.T, strict=True)))
    again = run(
        "place-experts", tmp_path / "trace.npz", "--ranks", 4, "--nodes", 2, "--current", used, "--time-limit", 1,
        "--weights", "hops=1,load=1,migration=1e9", "--json",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    second = json.loads(again.stdout)
    assert second["migrated"] == 0
    assert [layer["slots"] for layer in second["layers"]] == [layer["slots"] for layer in found["layers"]]


def placed(*arguments: object) -> Any:
    done = run("place-experts", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_load_matrix(tmp_path: Path) -> None:
    path = tmp_path / "loads.csv"
    path.write_text(EPLB)
    found = placed(path, "--ranks", 8, "--nodes", 2, "--slots", 16, "--groups", 4, "--policy", "hierarchical")
    assert [layer["max_over_mean"] for layer in found["layers"]] == pytest.approx([1.1694, 1.2422], abs=1e-4)
    assert found["status"] == "optimal" and found["hops"] == {"device": 0, "node": 0}
    rows = [[float(value) for value in line.split(",")] for line in EPLB.splitlines()]
    validate_placement(found, rows, [], 8, 2, 4)


def test_what_people_see(trace: Path) -> None:
    done = run("place-experts", trace, "--ranks", 2, "--time-limit", 1)
    assert done.returncode == 0, done.stderr
    for word in ("device hops", "max / mean load", "gap", "layer 0:"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("name", "text", "arguments", "said"),
    [
        ("gone.csv", None, [], "gone.csv"),
        ("a.csv", "token,layer,slot,expert\n0,0,0,1\n0,1,zero,2\n", [], "line 3"),
        ("a.csv", "token,layer,slot\n0,0,0\n", [], "'expert' is missing"),
        ("a.csv", "token,layer,slot,expert\n0,0,0,1\n0,0,0,2\n", [], "two rows"),
        ("a.csv", "token,layer,slot,expert\n", [], "no row"),
        ("a.csv", "1,2,3\n1,2\n", [], "line 2"),
        ("a.csv", "1,2,-3,4\n", [], "line 1"),
        ("a.csv", "1,2,3\n", [], "3 experts do not divide among 2 ranks"),
        ("a.csv", "1,2,3,4\n", ["--policy", "best"], "unknown policy"),
        ("a.csv", "1,2,3,4\n", ["--weights", "hop=1"], "hop=1"),
        ("a.csv", "1,2,3,4\n", ["--slots", 2], "cannot hold 4"),
        ("a.csv", "1,2,3,4\n", ["--current", "a.csv"], "not a placement"),
        ("a.npz", b"PK\x03\x04broken", [], "damaged"),
    ],
)
def test_bad_input(tmp_path: Path, name: str, text: str | bytes | None, arguments: list[object], said: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    words = [path if word == "a.csv" else word for word in arguments]
    done = run("place-experts", path, "--ranks", 2, *words)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr and "Traceback" not in done.stderr


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, effcc.cli, effcc.cli_place_experts, effcc.cli_trace_experts; "
        "import effcc.cost_model.expert_placement.solver, effcc.cost_model.expert_placement.search; "
        "import effcc.cost_model.expert_placement.columns, effcc.cost_model.expert_placement.copies_search; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
def test_recorded_routing_is_the_models_own(tmp_path: Path) -> None:
    """The trace beside the choices computed from the same weights and inputs; it can be placed."""
    import torch

    path, out = tmp_path / "moe.py", tmp_path / "trace.csv"
    path.write_text(MODEL)
    done = run("trace-experts", path, "-o", out, "--batches", 2, "--seed", 5, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["tokens"], facts["layers"], facts["experts"], facts["k"]) == (20, 2, 6, 2)
    assert "from the model" in done.stderr
    torch.manual_seed(5)
    names: dict[str, Any] = {}
    exec(MODEL.replace('print("from the model")', "pass"), names)
    model = names["model"]()
    wanted = []
    for batch in range(2):
        x = names["example_inputs"]()[0]
        for layer, module in enumerate((model[0], model[2])):
            index = module.router(x).topk(2, dim=-1)[1]
            wanted += [(10 * batch + t, layer, s, int(index[t, s])) for t in range(10) for s in range(2)]
            x = model[1](module(x))
    rows = np.loadtxt(out, delimiter=",", skiprows=1, dtype=np.int64)
    assert sorted(map(tuple, rows.tolist())) == sorted(wanted)
    assert len(placed(out, "--ranks", 2, "--time-limit", 1)["layers"]) == 2
    nothing = run("trace-experts", f"{path}:plain", "-o", out)
    assert nothing.returncode == 2 and "routes tokens" in nothing.stderr


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_routing_of_transformers_models(name: str) -> None:
    """Beside the router logits that the model itself gives out."""
    import models
    import torch
    from effcc.frontend.expert_trace import record_routing

    torch.manual_seed(1)
    sample = models.ZOO[name].build("tiny")
    sample.model.eval()
    found = record_routing(sample.model, [((), sample.inputs)])
    with torch.no_grad():
        logits = sample.model(**sample.inputs, output_router_logits=True).router_logits
    assert len(found.names) == len(logits)
    for layer, table in enumerate(logits):
        rows = found.layer == layer
        chosen = found.expert[rows].reshape(table.shape[0], -1)
        wanted = table.topk(chosen.shape[1], dim=-1)[1].numpy()
        assert (np.sort(chosen, axis=1) == np.sort(wanted, axis=1)).all()
    assert found.expert_count == logits[0].shape[1]


def test_padding_is_left_out() -> None:
    import models
    import torch
    from effcc.frontend.expert_trace import record_routing

    sample = models.mixtral("tiny")
    mask = torch.ones_like(sample.inputs["input_ids"])
    mask[1, 5:] = 0
    found = record_routing(sample.model, [((), sample.inputs | {"attention_mask": mask})])
    assert len(set(found.token.tolist())) == int(mask.sum())
