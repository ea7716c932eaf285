"""Masks and random numbers of whole vectors against the lane-by-lane code that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from effcc import torch_internals
from effcc.codegen import kernel_batch
from effcc.torch_internals import cpp_kernels
from fresh_seed import fresh_random
from some_by_default import some_by_default

pytestmark = pytest.mark.usefixtures("clean_compiler")

Tensors = tuple[torch.Tensor, ...]


def everything(x: torch.Tensor, y: torch.Tensor, given: torch.Tensor) -> Tensors:
    """Booleans that are stored, and that are read; random numbers; a dropout, whose mask its backward reads."""
    stored = x > y
    found = [stored, stored.logical_not() & given, torch.where(given, x, y), given * x, given.to(x.dtype)]
    found += [torch.rand_like(x, dtype=torch.float32) * y, torch.randn_like(x, dtype=torch.float32), torch.rand(7, 3)]
    if x.is_floating_point():
        leaf = x.detach().requires_grad_()
        dropped = F.dropout(leaf * y, 0.3).relu()
        found += [dropped, *torch.autograd.grad(dropped.sum() + given.sum(), leaf)]
    return tuple(found)


def run(inputs: Tensors, seed: int) -> Tensors:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    return torch.compile(everything, backend="effcc", dynamic=False)(*inputs)  # type: ignore[no-any-return]


NAMES = ("float32", "float64", "bfloat16", "int64", "int32")


@pytest.mark.parametrize("name", some_by_default(NAMES, {"float32"}))
def test_the_same_bits_as_lane_by_lane(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice, dtype = fresh_random(), getattr(torch, name)
    shape = (choice.randint(2, 9), choice.randint(1, 90))
    torch.manual_seed(choice.randrange(1 << 30))
    inputs = (*((5 * torch.randn(shape)).to(dtype) for _ in range(2)), torch.rand(shape) > 0.5)
    seed = choice.randrange(1 << 30)
    units: list[str] = []
    plain_compile = torch_internals.compile_cpp_module

    def compile_cpp_module(source: str) -> Callable[[], object]:
        units.append(source)
        return plain_compile(source)

    def alone(argument_types: list[str], source: str) -> object:
        raise AssertionError("the unit did not compile")

    monkeypatch.setattr(torch_internals, "compile_cpp_module", compile_cpp_module)
    monkeypatch.setattr(cpp_kernels, "load_cpp_kernel", alone)
    found = run(inputs, seed)
    assert units and all("namespace effcc_lanes" in unit for unit in units)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert any("effcc_lanes::draw<" in unit for unit in units), "this torch writes its loops over lanes otherwise"
    monkeypatch.setattr(kernel_batch, "LANES", "")
    monkeypatch.setattr(kernel_batch, "with_vector_draws", lambda source: source)
    expected = run(inputs, seed)
    assert units and "effcc_lanes" not in units[-1]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_kernels_compile_where_the_vectors_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another torch release may refuse the text: each kernel is then compiled as Inductor wrote it."""
    x = torch.randn(12, 40)
    monkeypatch.setattr(kernel_batch, "LANES", "this is no C++")
    compiled = torch.compile(lambda x: (x > 0.5, x.exp()), backend="effcc", dynamic=False)
    assert torch.equal(compiled(x)[0], x > 0.5)
