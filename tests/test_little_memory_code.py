"""Code for little memory: random numbers that no kernel stores are the same ones; calls of a library part kernels."""

from __future__ import annotations

import contextlib

import pytest
import torch
from effcc import torch_internals
from fresh_seed import fresh_random
from some_by_default import some_by_default
from torch import nn

pytestmark = pytest.mark.usefixtures("clean_compiler")


def compiled_code(
    function: object, *inputs: torch.Tensor, around: contextlib.AbstractContextManager[None]
) -> tuple[torch.Tensor, str]:
    """What a function computes, compiled by Inductor inside of ``around``, and the wrapper's text."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    seed = 5
    with around:
        torch.manual_seed(seed)
        result, code = run_and_get_code(torch.compile(function, backend="inductor"), *inputs)  # type: ignore[call-overload]
    return result, code[0]


def test_random_numbers_that_are_not_stored_are_the_same() -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(fresh_random().randrange(1 << 30)))
    weight = torch.randn(96, 8)

    def function(x: torch.Tensor) -> torch.Tensor:
        mask = torch.rand_like(x)
        first = (x * mask) @ weight  # two kernels read the numbers, with a product between them
        return mask.transpose(0, 1) * first[:, 0]

    stored, code = compiled_code(function, x, around=contextlib.nullcontext())
    inlined, other = compiled_code(function, x, around=torch_internals.inlined_random())
    assert torch.equal(stored, inlined)
    assert code.count("normalized_rand_cpu(") < other.count("normalized_rand_cpu("), "each kernel makes its own"


def test_what_a_call_parts_is_not_one_kernel() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 64), nn.Parameter(torch.randn(64, 64))

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        product = x.exp() @ weight
        return product.sin() @ weight, (x + 1).square()  # reads what exp reads, behind two products

    plain, code = compiled_code(function, x, around=torch_internals.fusions_within(64))
    parted, other = compiled_code(function, x, around=torch_internals.fusions_within(64, between_calls=True))
    assert all(torch.equal(one, two) for one, two in zip(plain, parted, strict=True))
    assert code.count("async_compile.cpp_pybinding(") < other.count("async_compile.cpp_pybinding(")


@pytest.mark.parametrize("columns", some_by_default([64, 61], {61}))
def test_a_softmax_takes_the_memory_of_the_scores_that_it_is_the_last_to_read(columns: int) -> None:
    generator = torch.Generator().manual_seed(fresh_random().randrange(1 << 30))
    query, key = (torch.randn(rows, 16, generator=generator) for rows in (96, columns))

    def function(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = (query @ key.mT).softmax(-1)  # its exponentials are read twice, and held a row at a time
        return kept, (kept * torch.rand_like(kept)) @ key

    def read_otherwise(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = query @ key.mT
        return scores.softmax(-1), scores.flip(0).exp()

    over = torch_internals.written_over_through_rows
    for asked, fewer in ((function, 1), (read_otherwise, 0)):
        plain, code = compiled_code(asked, query, key, around=contextlib.nullcontext())
        taken, other = compiled_code(asked, query, key, around=over())
        assert all(torch.equal(one, two) for one, two in zip(plain, taken, strict=True))
        size = f"empty_strided_cpu((96, {columns})"
        assert other.count(size) == code.count(size) - fewer, asked.__name__
