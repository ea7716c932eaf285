"""Code for little memory: random numbers that no kernel stores are the same ones; calls of a library part kernels."""

from __future__ import annotations

import contextlib

import pytest
import torch
from effcc import torch_internals
from fresh_seed import fresh_random
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
