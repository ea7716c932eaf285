"""Einsums on torch tensors against the numpy interpreter, and compiled models whose kernels do not compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import effcc
import numpy as np
import pytest
import torch
from effcc import torch_internals
from effcc.codegen.einsums import Values, run_cascade
from effcc.ir.cascade import Cascade
from effcc.ir.cascade_interpreter import evaluate
from effcc.ir.cascade_parser import parse_cascade
from fresh_seed import fresh_random
from numpy.typing import NDArray
from random_cascades import SIZES, random_cascade, random_inputs

OTHERS = {
    "a banded product": "Y[n] = sum[k] where((k >= 0) * (n + k < |n|), X[n + k] * W[k], 0)",
    "a chunk, and one beyond the end": "Y[c] = sum[j] where(c*3 + j < |n|, X[c*3 + j], 0)\nZ[c] = max[j] X[c*3 + j]",
    "a gathered row": "Y[m,f] = sum[n] where(n == T[m], 1, 0) * W[n,f]",
    "a gathered row with a weight": "Y[m,f] = sum[n] where(n == T[m], 1, 0) * W[n,f] * U[m]",
    "a product over two ranks": "Y[f] = prod[n,m] S[m,n] * G[f]",
    "a diagonal": "Y[] = sum[n] D[n,n]",
    "a sum without the rank": "Y[m] = sum[n] U[m]",
}


def assert_equal(cascade: Cascade, inputs: dict[str, NDArray[Any]], sizes: dict[str, int]) -> None:
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    found = run_cascade(cascade, Values(tensors, sizes=sizes, extents=sizes))
    for name, wanted in evaluate(cascade, inputs, sizes).items():
        if name in cascade.definitions:
            np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-9, atol=1e-9, err_msg=name)


def test_random_cascades() -> None:
    generator = fresh_random()
    for _ in range(25):
        seed = generator.getrandbits(32)
        cascade = random_cascade(seed)
        print(seed, cascade)
        sizes = {rank.name: SIZES[rank.name] for rank in cascade.ranks}
        assert_equal(cascade, random_inputs(cascade, seed), sizes)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_read_at_other_places(name: str) -> None:
    numbers = np.random.default_rng(fresh_random().getrandbits(32))
    cascade = parse_cascade(OTHERS[name])
    sizes = {"n": 7, "m": 4, "f": 3, "k": 3, "c": 3, "j": 3}
    shapes = {"X": "n", "W": "nf", "U": "m", "S": "mn", "G": "f", "D": "nn", "T": "m"}
    if name == "a banded product":
        shapes["W"] = "k"
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in cascade.inputs:
        shape = [sizes[rank] for rank in shapes[tensor]]
        inputs[tensor] = numbers.integers(-1, 9, shape) if tensor == "T" else numbers.normal(size=shape)
    assert_equal(cascade, inputs, {rank.name: sizes[rank.name] for rank in cascade.ranks} | {"n": 7})


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    apart = document[:, None] != document[None, :]
    return torch.softmax(scores.masked_fill(apart, float("-inf")), -1) @ v


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


@pytest.fixture
def refused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler of fused kernels is killed, as by the out-of-memory killer."""

    def start(source: str) -> Callable[[], Any]:
        def load() -> Any:
            raise OSError("killed by signal 9")

        return load

    monkeypatch.setattr(torch_internals, "start_cpp_library", start)


@pytest.mark.usefixtures("clean_compiler", "refused_kernels")
def test_kernels_that_do_not_compile_run_as_eager_ops() -> None:
    torch.manual_seed(fresh_random().getrandbits(32))
    length = 601 + int(torch.randint(0, 50, ()))
    case = [torch.randn(1, 4, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    document = torch.randint(0, 3, (length,)) + (1 << 40)
    slope = torch.randn_like(case[0])
    found = torch.compile(attention, backend="effcc")(*case, document)
    gradients = torch.autograd.grad(found, case, slope)
    wanted = attention(*case, document)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, case, slope), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for report in effcc.reports():
        assert not report.cascades
        assert any("eager ops" in reason and "signal 9" in reason for reason in report.not_fused)


@pytest.mark.usefixtures("clean_compiler", "refused_kernels")
def test_they_are_an_error_where_fallbacks_are() -> None:
    case = [torch.randn(1, 4, 660 + 7 * n, 8) for n in (0, 1, 1)]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"CompileError.*signal 9"):
        torch.compile(plain, backend="effcc", options={"fallback": "error"})(*case)
