"""A value that many kernels read is stored where computing it again for each takes longer; results stay the same."""

from __future__ import annotations

import effcc
import pytest
import torch
from effcc import torch_internals
from fresh_seed import fresh_random
from torch import nn

pytestmark = pytest.mark.usefixtures("clean_compiler")


class Masked(nn.Module):
    """Layers of attention written out, with a mask of positions and documents, and angles of positions."""

    def __init__(self, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        feature = width // self.heads
        places = torch.arange(length, device=x.device)
        allowed = (places[:, None] >= places) & (documents[:, None, :, None] == documents[:, None, None, :])
        bias = torch.where(allowed, 0.0, -1e9).to(x.dtype)
        angles = places[:, None] * torch.linspace(0.1, 1.0, feature, device=x.device, dtype=x.dtype)
        cos, sin = angles.cos(), angles.sin()
        for project in self.projections:
            query, key, value = (
                part.view(batch, length, self.heads, feature).transpose(1, 2)
                for part in project(nn.functional.layer_norm(x, (width,))).chunk(3, dim=-1)
            )
            query, key = query * cos + query.flip(-1) * sin, key * cos + key.flip(-1) * sin
            scores = query @ key.transpose(-1, -2) * feature**-0.5 + bias
            x = x + (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
        return x


def stored_in(reports: list[effcc.GraphReport]) -> list[str]:
    lines = (line for report in reports for region in report.regions for line in region.source.splitlines())
    return [line for line in lines if line.startswith("# stored, not computed for each reader")]


@pytest.mark.slow
def test_masks_and_angles_are_stored_and_nothing_else_changes() -> None:
    random = fresh_random()
    torch.manual_seed(random.randrange(1 << 30))
    layers, heads = random.randint(3, 4), random.randint(8, 10)
    width, length = heads * 16, random.randint(300, 400)
    model = Masked(layers, heads, width)
    x = torch.randn(2, length, width, requires_grad=True)
    documents = torch.randint(0, 3, (2, length)).sort(-1).values
    options = {"cascades": False, "repeated_modules": False}
    result = torch.compile(model, backend="effcc", options=options)(x, documents)
    wanted_by = torch.randn_like(result)
    given = torch.autograd.grad((result * wanted_by).sum(), [x, *model.parameters()])
    exact_model, exact_x = Masked(layers, heads, width).double(), x.detach().double().requires_grad_()
    exact_model.load_state_dict(model.state_dict())
    exact = exact_model(exact_x, documents)
    gradients = torch.autograd.grad((exact * wanted_by).sum(), [exact_x, *exact_model.parameters()])
    for one, other in zip([result, *given], [exact, *gradients], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    stored = stored_in(effcc.reports())
    assert any(f"({2 * length * length * 4} bytes" in line for line in stored), f"the mask is not: {stored}"
    assert sum(f"({length * 16 * 4} bytes" in line for line in stored) >= 2, f"the angles are not: {stored}"


def test_values_of_rows_are_not_offered_as_read_by_each_element() -> None:
    """A row's number is computed once for its row, however long that is."""
    offered: list[torch_internals.ReadValue] = []

    def none(value: torch_internals.ReadValue) -> bool:
        offered.append(value)
        return False

    def function(x: torch.Tensor) -> torch.Tensor:
        row = x.sum(-1, keepdim=True)
        scale = (row * 3 + 1).sin()
        return x * scale + x.exp() / scale

    x = torch.randn(64, 96)
    with torch_internals.values_stored(none, "a test"), torch_internals.without_code_cache():
        torch.compile(function, backend="inductor")(x)
    numbers = [value for value in offered if value.elements == 64]
    assert numbers, "none was offered"
    assert all(read == 64 for value in numbers for read in value.reads)
