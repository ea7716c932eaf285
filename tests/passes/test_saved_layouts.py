"""saved-layouts: text in, text out, and real convolutional networks."""

from __future__ import annotations

import effcc
import pytest
import torch
from effcc.ir.parser import parse_graph
from effcc.passes.saved_layouts import SavedLayouts
from torch import nn

ATTRIBUTES = "[1, 1], [0, 0], [1, 1], False, [0, 0], 1"


def graph(
    image: str = "f32[4,3,8,8]", weight: str = "f32[5,3,3,3]", more: str = "", outputs: str = "%y, %x, %w"
) -> str:
    return f"""graph @net phase=forward saved=2 {{
        %x: {image} = input()  role(input)
        %w: {weight} = input()  role(parameter)
        %y: f32[4,5,6,6] = aten.convolution.default(%x, %w, None, {ATTRIBUTES})
        {more}
        return ({outputs})
    }}"""


def saved_by(text: str) -> list[str]:
    return list(SavedLayouts().apply(parse_graph(text)).output_names())


def test_the_copies_are_what_is_saved() -> None:
    assert saved_by(graph()) == ["y", "x_channels_last", "w_channels_last"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (graph(weight="f32[5,3,1,1]"), ["y", "x_channels_last", "w"]),
        (graph(image="f32[4,1,8,8]"), ["y", "x", "w_channels_last"]),
        (graph(image="f32[4,3,8,8]{192,1,24,3}"), ["y", "x", "w_channels_last"]),
        (graph(image="f32[4,3,8,8] @cuda:0"), ["y", "x", "w_channels_last"]),
        (graph(outputs="%x, %y, %w"), ["x", "y", "w_channels_last"]),
        (graph(more="%t: f32[4,3,8,8] = aten.add_.Tensor(%x, 1)"), ["y", "x", "w_channels_last"]),
    ],
    ids=["one pixel", "one channel", "in that order already", "another device", "returned to the caller", "written to"],
)
def test_left_alone(text: str, expected: list[str]) -> None:
    assert saved_by(text) == expected


def test_an_inference_graph_is_the_same_object() -> None:
    inference = parse_graph(graph().replace("phase=forward saved=2", "phase=inference"))
    assert SavedLayouts().apply(inference) is inference


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_eager(groups: int) -> None:
    seed = int(torch.seed())
    print("seed", seed)
    torch.manual_seed(seed)
    layers = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, groups=groups)
    model = nn.Sequential(*layers).double()
    image = torch.randn(2, 4, 9, 7, dtype=torch.float64, requires_grad=True)
    results = []
    # What other tests did with such a model must not make its sizes symbols.
    for run in (model, torch.compile(model, backend="effcc", dynamic=False)):
        loss = run(image).square().mean()
        results.append(torch.autograd.grad(loss, [image, *model.parameters()]))
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    step = effcc.reports()[-2]
    assert step.phase == "forward" and "channels_last" in step.host_source
