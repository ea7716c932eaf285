"""What a convolution holds for itself: found by running it, counted in the plan of compiled code."""

from __future__ import annotations

import random

import effcc
import pytest
import torch
from effcc.codegen.library_workspace import LibraryCall, Operand, traced_workspaces, workspace_of
from effcc.codegen.wrapper_memory import wrapper_memory
from effcc.measuring import peak_of
from torch import nn

WRAPPER = """
def call(args):
    image, weight, = args
    buf0 = empty_strided_cpu((4, 3, 40, 40), (4800, 1, 120, 3), torch.float32)
    cpp_fused_0(image, buf0)
    buf1 = extern_kernels.convolution(buf0, {weight}, stride=(1, 1), padding=(1, 1), dilation=(1, 1), transposed=False,
        output_padding=(0, 0), groups=1, bias=None)
    assert_size_stride(buf1, (4, 5, 40, 40), (8000, 1, 200, 5), 'torch.ops.aten.convolution.default')
    return (buf1, )
"""
IMAGE = Operand((4, 3, 40, 40), (4800, 1, 120, 3), torch.float32)
WEIGHT = Operand((5, 3, 3, 3), (27, 1, 9, 3), torch.float32)
CONVOLVED = LibraryCall(
    "extern_kernels.convolution",
    (IMAGE, WEIGHT),
    tuple(
        {
            "stride": (1, 1),
            "padding": (1, 1),
            "dilation": (1, 1),
            "transposed": False,
            "output_padding": (0, 0),
            "groups": 1,
            "bias": None,
        }.items()
    ),
)


def workspace_in(weight: str, layouts: dict[str, Operand]) -> int:
    memory = wrapper_memory(
        WRAPPER.format(weight=weight),
        ["image", "weight"],
        ["buf1"],
        {"image": 4 * 4800 * 4, "weight": 135 * 4},
        lambda op, size: 4 * torch.Size(size).numel(),
        layouts=layouts,
    )
    assert memory is not None
    return sum(buffer.bytes for buffer in memory.buffers if buffer.name.endswith("workspace"))


def test_a_wrapper_says_what_its_convolutions_read() -> None:
    measured = workspace_of(CONVOLVED)
    assert measured is not None
    assert workspace_in("weight", {"weight": WEIGHT}) == measured
    seen = "reinterpret_tensor(weight, (5, 3, 3, 3), (27, 1, 9, 3), 0)"
    flat = Operand((135,), (1,), torch.float32)
    assert workspace_in(seen, {"weight": flat}) == measured
    # A weight that is known only by its bytes counts once, in oneDNN's blocks.
    assert workspace_in("weight", {}) == 135 * 4


def test_while_a_profiler_records_nothing_is_measured() -> None:
    call = LibraryCall(
        CONVOLVED.op, (Operand((2, 3, 40, 40), (4800, 1, 120, 3), torch.float32), WEIGHT), CONVOLVED.kwargs
    )
    with torch.profiler.profile(profile_memory=True):
        assert workspace_of(call) is None
    assert workspace_of(call) is not None


def test_convolutions_of_a_traced_graph() -> None:
    class Two(nn.Module):
        def forward(self, image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ones, image = (1, 1), image.relu()
            return torch.ops.aten.convolution.default(image, weight, None, ones, ones, ones, False, (0, 0), 1)

    program = torch.export.export(Two(), (torch.randn(4, 3, 40, 40), torch.randn(5, 3, 3, 3)))
    found = traced_workspaces(program.graph_module)
    assert found == {"convolution": workspace_of(CONVOLVED)}


@pytest.mark.usefixtures("clean_compiler")
def test_a_plan_counts_what_convolutions_hold() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    given, inner, out = draw.choice((1, 3, 5, 16)), draw.choice((7, 24, 64)), draw.choice((3, 32))
    first, second, stride = draw.choice((3, 5, 8)), draw.choice((1, 3)), draw.choice((1, 2))
    model = nn.Sequential(nn.Conv2d(given, inner, first, stride), nn.GELU(), nn.Conv2d(inner, out, second))
    image = torch.randn(draw.choice((1, 4)), given, draw.randint(20, 60), draw.randint(20, 60))
    compiled = torch.compile(model, backend="effcc", options={"memory_budget": "1GiB"})

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(image).square().mean().backward()

    step()
    plan = effcc.reports()[-1].plan
    assert plan is not None
    model.zero_grad(set_to_none=True)
    measured = peak_of(step, torch.device("cpu")) + image.nbytes + sum(p.nbytes for p in model.parameters())
    assert measured <= plan.peak["device"] <= 1.1 * measured
