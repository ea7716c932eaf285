"""What a loss outside the compiled function holds: which outputs count, and that the allocator never finds more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effcc.cost_model.outside_loss import COPIES, outside_loss_bytes
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.torch_internals import peak_growth

ROWS, CLASSES = 64, 96
SIZE = ROWS * CLASSES * 4

JOINT = """
graph @net phase=joint {{
  %x: f32[64,32] = input() role(input)
  %w: f32[32,96] = input() role(parameter)
  %r: f32[32,4] = input() role(parameter)
  {tangents}
  %h: f32[64,32] = aten.tanh.default(%x)
  %n: f32[64,32] = aten.neg.default(%h)
  %m: f32[64,96] = aten.mm.default(%n, %w)
  %y: f32[1,64,96] = aten.view.default(%m, [1, 64, 96])
  %q: f32[64,4] = aten.mm.default(%h, %r)
  %a: f32[] = aten.sum.default(%q)
  %l: f32[] = aten.sum.default(%{loss})
  alias %y of %m
  return ({outputs})
}}
"""


def counted(outputs: str, tangents: dict[str, str], loss: str = "m") -> int:
    given = "\n  ".join(f"%{name}: {kind} = input() role(tangent)" for name, kind in tangents.items())
    graph: Graph = parse_graph(JOINT.format(outputs=outputs, tangents=given, loss=loss))
    nodes = [node for node in graph.inputs if node.role == "tangent"]
    return outside_loss_bytes(graph, len(graph.outputs), nodes)


@pytest.mark.parametrize(
    ("outputs", "tangents", "loss", "expected"),
    [
        pytest.param("%y", {"t": "f32[1,64,96]"}, "m", COPIES * SIZE, id="logits"),
        pytest.param("%l", {"t": "f32[]"}, "m", 0, id="loss inside"),
        pytest.param("%l, %y", {"t": "f32[]", "u": "f32[1,64,96]"}, "m", 0, id="loss inside, of the logits"),
        pytest.param("%l, %y", {"t": "f32[]", "u": "f32[1,64,96]"}, "n", 0, id="of what the logits are made of"),
        pytest.param("%a, %y", {"t": "f32[]", "u": "f32[1,64,96]"}, "m", COPIES * SIZE, id="of something else"),
        pytest.param("%y, %q", {"t": "f32[1,64,96]"}, "m", COPIES * SIZE, id="one takes no gradient"),
    ],
)
def test_outputs_without_a_loss_of_their_own_count(
    outputs: str, tangents: dict[str, str], loss: str, expected: int
) -> None:
    assert counted(outputs, tangents, loss) == expected


class Handed(torch.autograd.Function):
    """Outputs of a compiled function: its forward and backward hold nothing that is counted here."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor) -> torch.Tensor:
        return torch.ones(ROWS, CLASSES)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.new_zeros(())


CLASS_OF = torch.arange(ROWS)
WANTED = torch.rand(ROWS, CLASSES)
LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cross entropy": lambda y: F.cross_entropy(y, CLASS_OF),
    "smoothed": lambda y: F.cross_entropy(y, CLASS_OF, label_smoothing=0.1),
    "shifted": lambda y: F.cross_entropy(y[:-1], CLASS_OF[:-1]),
    "mse": lambda y: F.mse_loss(y, WANTED),
    "squares": lambda y: y.square().mean(),
    "squared differences": lambda y: ((y - WANTED) ** 2).sum(),
    "l1": lambda y: F.l1_loss(y, WANTED),
    "huber": lambda y: F.huber_loss(y, WANTED),
    "binary": lambda y: F.binary_cross_entropy_with_logits(y, WANTED),
    "divergence": lambda y: F.kl_div(F.log_softmax(y, -1), WANTED, reduction="batchmean"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_allocator_finds_no_more(name: str) -> None:
    given = torch.zeros((), requires_grad=True)

    def step() -> None:
        outputs = Handed.apply(given)  # held until the backward is over
        LOSSES[name](outputs).backward()

    step()
    _, peak = peak_growth(step)
    assert peak is not None
    # Scalars, counts of rows and the gradient of ``given`` are a few bytes a row.
    assert peak <= (2 + COPIES) * SIZE + 32 * ROWS + 256
