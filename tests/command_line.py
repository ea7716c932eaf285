"""Running a command as a person does, and what the tests of commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

LINEAR = """
import torch

def model():
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))

example_inputs = (torch.randn(32, 64),)

def loss(y):
    return y.square().mean()
"""
#: Of the model above: two weights and two biases, float32.
PARAMETER_BYTES = 4 * (64 * 256 + 256 + 256 * 64 + 64)

DEAD = """graph @g phase=inference {
  %x: f32[4,8] = input()  role(input)
  %unused: f32[4,8] = aten.sin.default(%x)  loc(model.py:3 "a = x.sin()" in layers.0)
  %y: f32[4,8] = aten.cos.default(%x)  loc(model.py:4 "b = x.cos()" in layers.0)
  %z: f32[4,8] = aten.cos.default(%x)  loc(model.py:5 "c = x.cos()" in layers.1)
  %sum: f32[4,8] = aten.add.Tensor(%y, %z)
  return (%sum)
}
"""


class Result(NamedTuple):
    code: Any
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Effcc = Callable[..., Result]


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one error on standard error, with ``words`` in it, nothing on standard output, no traceback."""
    assert result.code == 2, result
    assert result.err.startswith("effcc: error: ")
    assert result.out == ""
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
