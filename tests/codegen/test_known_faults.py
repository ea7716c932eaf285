"""Ops that Inductor computes wrongly run as eager ops, and the report says so."""

from __future__ import annotations

import pytest
import torch
from fresh_seed import fresh_random

pytestmark = pytest.mark.usefixtures("clean_compiler")


def complex_eigenvalues(generator: torch.Generator) -> torch.Tensor:
    """A real [5, 5] matrix that has some."""
    while True:
        matrix = torch.randn(5, 5, dtype=torch.float64, generator=generator)
        if torch.linalg.eigvals(matrix).imag.abs().max() > 0.1:
            return matrix


@pytest.mark.filterwarnings("ignore:linalg_eig_backward")
def test_complex_tensor_is_written_before_it_is_read() -> None:
    """The backward of ``eig`` writes diagonals. With a generated kernel in the same graph, Inductor orders the writes
    behind the products that read them."""
    generator = torch.Generator().manual_seed(fresh_random().getrandbits(32))
    matrix, other = complex_eigenvalues(generator), torch.rand(20, 20, dtype=torch.float64, generator=generator)

    def work(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eig(x)
        return values.abs(), vectors.abs(), torch.log1p(y)

    slopes = [torch.rand(shape, dtype=torch.float64, generator=generator) for shape in [(5,), (5, 5), (20, 20)]]

    def gradients(run: object) -> tuple[torch.Tensor, ...]:
        x, y = matrix.clone().requires_grad_(), other.clone().requires_grad_()
        return torch.autograd.grad(run(x, y), [x, y], slopes)  # type: ignore[operator]

    wanted = gradients(work)
    with pytest.warns(RuntimeWarning, match="written through a view"):
        found = gradients(torch.compile(work, backend="effcc", fullgraph=True))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cascades", [False, True])
def test_attention_is_divided_by_a_whole_number(cascades: bool) -> None:
    """Inductor's attention patterns raise an IndexError for it, at batch 1."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v

    generator = torch.Generator().manual_seed(fresh_random().getrandbits(32))
    inputs = [torch.randn(1, 2, 60, 16, generator=generator, requires_grad=True) for _ in range(3)]
    found = torch.compile(attention, backend="effcc", options={"cascades": cascades})(*inputs)
    wanted = attention(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    slope = torch.randn(wanted.shape, generator=generator)
    for mine, theirs in zip(*(torch.autograd.grad(each, inputs, slope) for each in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
