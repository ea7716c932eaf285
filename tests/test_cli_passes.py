"""``effcc passes`` on a model file: its own attention, found in its training step and explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Effcc

MODEL = """
import torch
from torch import nn


class Capped(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = 20 * torch.tanh(q @ k.transpose(-1, -2) / 7)
        return self.out(torch.softmax(scores, -1) @ v)


model = Capped
example_inputs = (torch.randn(3, 1500, 48),)
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "capped.py"
    path.write_text(MODEL)
    return path


def test_the_attention_of_a_model_is_found_with_its_proof(effcc: Effcc, model_file: Path) -> None:
    result = effcc("passes", model_file, "--train", "--json")
    assert result.code == 0, result.err
    groups = [group for graph in result.json["graphs"] for group in graph["groups"]]
    assert len(groups) == 2, "a forward and its backward"
    for group in groups:
        assert group["source"].startswith(str(model_file))
        assert group["traffic"]["fused"] < group["traffic"]["written"] / 10
        assert all(certificate["residual"] == "0" for certificate in group["certificates"])
    forward = groups[0]
    assert max(count for ranks in forward["as_written"].values() for count in ranks.values()) == 3
    assert all(count <= 1 for ranks in forward["rewritten"].values() for count in ranks.values())
    assert forward["certificates"]


def test_in_words(effcc: Effcc, model_file: Path) -> None:
    result = effcc("passes", model_file)
    assert result.code == 0, result.err
    assert "of traffic as written" in result.out and "Certificates" in result.out
    assert "not fused" in result.out


def test_a_file_without_a_model(effcc: Effcc, tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    result = effcc("passes", path)
    assert result.code == 2 and "model" in result.err
