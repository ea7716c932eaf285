"""``effcc predict FILE.py`` as a user calls it: on devices, on meshes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import PARAMETER_BYTES, Effcc, refused

#: Written out by hand: no configuration, no fused attention, a projection for queries, keys and values together.
TRANSFORMER = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, s, w = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.mixed(self.first(x)).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2)) / (w // self.heads) ** 0.5
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, w))
        return x + self.down(torch.nn.functional.gelu(self.up(self.second(x))))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 64)
        self.blocks = nn.ModuleList(Block(64, 4) for _ in range(3))
        self.head = nn.Linear(64, 1000, bias=False)

    def forward(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

model = Model
example_inputs = (torch.zeros(5, 32, dtype=torch.long),)
"""
LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                     num_attention_heads=128, num_key_value_heads=8, max_position_embeddings=8192, use_cache=False)

def model():
    return LlamaForCausalLM(CONFIG)

def example_inputs():
    return {"input_ids": torch.zeros(1, 8192, dtype=torch.long)}
"""


def test_devices_are_priced_from_one_capture_as_plan_prices_them(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    result = effcc("predict", linear, "--train", "--optimizer", "adamw", "--device", "h100,l4", "--json")
    assert result.code == 0, result.err
    rows = {row["device"]: row for row in result.json["devices"]}
    assert list(rows) == ["h100", "l4"]
    planned = effcc("plan", linear, "--train", "--optimizer", "adamw", "-d", "l4", "-o", tmp_path / "p.effcc", "--json",
                    "--no-report").json["summary"]  # fmt: skip
    assert (rows["l4"]["seconds"], rows["l4"]["peak"]) == (planned["seconds"], planned["peak"])
    for row in rows.values():
        assert row["low"] < row["seconds"] < row["high"] and row["fits"]
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert 0 < row["learned"] <= 1  # f32 products on CUDA devices are what the kernel model learned
    assert rows["h100"]["memory"]["parameter"] == PARAMETER_BYTES
    # forward: two products; backward: two gradients of weights and one of the values between
    flop = 2 * 32 * 64 * 256 * (2 + 3)
    for name, peak in (("h100", 66.9e12), ("l4", 30.3e12)):
        assert rows[name]["mfu"] == pytest.approx(flop / (rows[name]["seconds"] * peak), rel=0.01)


def test_a_table_with_a_row_for_each_device(effcc: Effcc, linear: Path) -> None:
    result = effcc("predict", linear, "--device", "a100-80g,h200")
    assert result.code == 0, result.err
    assert [line.split()[0] for line in result.out.splitlines() if "GiB" in line] == ["a100-80g", "h200"]


def test_a_mesh_of_a_transformer_written_by_hand(effcc: Effcc, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(TRANSFORMER)
    mesh = ("predict", path, "--train", "--device", "h100,a100-80g", "--mesh", "dp=2,tp=2,pp=3", "--microbatches", "6")
    result = effcc(*mesh, "--json")
    assert result.code == 0, result.err
    shape = result.json["shape"]
    names = ("layers", "hidden", "heads", "kv_heads", "feed_forward", "vocabulary", "sequence", "gated", "tied")
    assert [shape[name] for name in names] == [3, 64, 4, 4, 256, 1000, 32, False, False]
    for row in result.json["devices"]:
        assert row["devices"] == 12
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
        assert sum(row["memory"].values()) == pytest.approx(row["peak"])
        assert row["tokens_per_second"] == pytest.approx(5 * 32 * 6 * 2 / row["seconds"])
    text = effcc(*mesh).out
    assert "12 devices (dp=2,tp=2,pp=3)" in text and "bubble" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mesh", "dp=8"), ("--train",)),
        (("--train", "--mesh", "xp=8"), ("xp",)),
        (("--train", "--mesh", "dp=8", "--recompute", "some"), ("recompute",)),
        (("--train", "--microbatches", "2"), ("--mesh",)),
        (("--device", "h1000"), ("h1000", "h100")),
        (("--device", ","), ("--device",)),
        (("--dtype", "i8"), ("i8",)),
    ],
)
def test_what_is_refused(effcc: Effcc, linear: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(effcc("predict", linear, *options), *words)


def test_a_mesh_of_what_is_no_transformer_is_refused(effcc: Effcc, linear: Path) -> None:
    refused(effcc("predict", linear, "--train", "--mesh", "tp=2", "--device", "h100"), "no transformer", "attention")


def test_calibrating_steps_needs_measured_ones(effcc: Effcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(effcc("calibrate", "--steps"), "--from-data")
    monkeypatch.setenv("EFFCC_BENCH_DATA", str(tmp_path))
    refused(effcc("calibrate", "--from-data", "--steps", "-o", tmp_path / "made.json"), "vtrain_single_given.csv")


def test_kernels_are_still_predicted(effcc: Effcc, tmp_path: Path) -> None:
    asked = tmp_path / "asked.csv"
    asked.write_text("OPName,Device,B,M,N,K\nlinear,NVIDIA L4,1,512,512,512\n")
    result = effcc("predict", "kernels", asked)
    assert result.code == 0 and "predicted_ms" in result.out


@pytest.mark.slow
def test_llama_3_405b_on_128_devices(effcc: Effcc, tmp_path: Path) -> None:
    path = tmp_path / "llama.py"
    path.write_text(LLAMA)
    result = effcc(
        "predict", path, "--train", "--dtype", "bf16", "--device", "h100", "--mesh", "tp=8,pp=16", "--json"
    )  # fmt: skip
    assert result.code == 0, result.err
    (row,) = result.json["devices"]
    assert row["devices"] == 128 and result.json["shape"]["layers"] == 126
    # bf16 weights and f32 gradients and three f32 numbers of state, on the fullest of 128: 126 layers over 16 stages
    assert row["memory"]["parameters"] == pytest.approx(2 * 405.85e9 / 128, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2_train", "mixtral", "qwen3_moe"])
def test_the_capture_and_the_configuration_say_the_same(name: str) -> None:
    from effcc.cost_model.parallel_training.derive import shape_of_graph
    from effcc.cost_model.parallel_training.shape import shape_from_config
    from effcc.frontend.model_file import load_model_file
    from effcc.frontend.without_weights import Weightless
    from effcc.plan_capture import capture_model
    from effcc.plan_request import PlanRequest

    path = str(Path(__file__).parents[1] / "examples" / f"{name}.py")
    captured = capture_model(PlanRequest(path, fuse=False))
    seen, _ = shape_of_graph(captured.graphs[0], captured.sizes)
    with Weightless().building():
        config = load_model_file(path).build_model().config.to_dict()
    said = shape_from_config(config, seen.sequence)
    ignored = {"dropout", "positions"}  # an inference graph has no dropout; a table may be longer than the inputs
    assert {k: v for k, v in vars(seen).items() if k not in ignored} == {
        k: v for k, v in vars(said).items() if k not in ignored
    }
