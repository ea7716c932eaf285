"""Inputs that a compiler meets seldom: eager's result or an error that says what is wrong, never a wrong number."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effcc
import pytest
import torch
from models import Tower
from some_by_default import some_by_default
from subprocesses import STEP, results, start
from torch import nn
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("clean_compiler")


def compile_(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="effcc", **settings)


def error_chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__  # type: ignore[assignment]
    return found


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_bugdet": "1GiB"}, ["memory_bugdet", "memory_budget"]),
        ({"memory_budget": "lots"}, ["memory_budget", "lots"]),
        ({"fallback": "never"}, ["fallback", "eager", "error"]),
        ({"plan": "/nonexistent/plan.effcc"}, ["/nonexistent/plan.effcc"]),
        ({"device": "h900"}, ["h900"]),
    ],
)
def test_wrong_options_are_refused_with_the_right_ones(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(Exception) as caught:
        compile_(torch.sin, options=options)(torch.ones(3))
    ours = [error for error in error_chain(caught.value) if isinstance(error, effcc.EffccError)]
    assert ours, error_chain(caught.value)
    for word in words:
        assert word in str(ours[0])
        assert word in str(caught.value), "what the user sees first says it too"


def test_plans_for_this_model_for_another_and_damaged(tmp_path: Path) -> None:
    """A plan is accepted for the graph that it was made for, and refused by name for another or with bytes missing."""
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).double(), torch.randn(3, 8).double()
    path = tmp_path / "plan.effcc"
    effcc.plan(model, (x,)).save(path)
    with torch.no_grad():
        assert_close(compile_(model, options={"plan": str(path)})(x), model(x), rtol=1e-12, atol=1e-12)
    damaged = tmp_path / "damaged.effcc"
    damaged.write_bytes(path.read_bytes()[:-200])
    other = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    for wrong, plan in ((other, path), (model, damaged)):
        torch._dynamo.reset()
        with pytest.raises(Exception) as caught, torch.no_grad():
            compile_(wrong, options={"plan": str(plan)})(x)
        ours = [error for error in error_chain(caught.value) if isinstance(error, effcc.EffccError)]
        assert ours and type(ours[0]).__name__ == "PlanError" and ours[0].remedy
        if wrong is other:
            assert "gelu" in str(ours[0]) or "tanh" in str(ours[0]), "names the first op that differs"


def test_strict_mode_names_what_cannot_be_compiled() -> None:
    with pytest.raises(Exception) as caught:
        compile_(failing_op, options={"fallback": "error"})(torch.ones(3))
    assert "effcc_tests.no_kernel" in str(caught.value) or "no_kernel" in str(caught.value)


@torch.library.custom_op("effcc_tests::no_kernel", mutates_args=())
def no_kernel(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no_kernel has no kernel for this machine")


@no_kernel.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def failing_op(x: torch.Tensor) -> torch.Tensor:
    return no_kernel(x * 2) + 1


def test_an_error_at_run_time_is_the_users_own() -> None:
    """What an op raises reaches the caller as it is, and the compiled function works afterwards."""
    run = compile_(failing_op)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no_kernel has no kernel for this machine"):
            run(torch.ones(3))
    checked = compile_(lambda x, i: x[i] * 2)
    x = torch.arange(4.0)
    with pytest.raises((RuntimeError, IndexError), match=r"(?i)index|bounds"):
        checked(x, torch.tensor([0, 9]))
    assert checked(x, torch.tensor([1, 3])).tolist() == [2, 6]


def test_wrong_shapes_are_told_as_eager_tells_them() -> None:
    model = nn.Linear(8, 4)
    with pytest.raises(RuntimeError, match=r"3x7|size|shape"):
        compile_(model)(torch.ones(3, 7))
    assert_close(compile_(model)(torch.ones(3, 8)), model(torch.ones(3, 8)))


# Python that depends on data


def test_branch_on_a_value() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if y.sum() > 0:
            return y.sin()
        return y.cos() - 1

    call = compile_(run)
    for x in (torch.ones(4), -torch.ones(4), torch.ones(4) * 3):
        assert_close(call(x), run(x))


def test_branch_on_a_value_in_a_whole_graph_is_refused_with_its_line() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return x.sin() if x.sum() > 0 else x.cos()

    with pytest.raises(Exception, match=r"(?is)data-dependent.*test_bad_input.py"):
        compile_(run, fullgraph=True)(torch.ones(4))


@pytest.mark.parametrize("whole", some_by_default([False, True], {True}))
def test_values_read_by_python(whole: bool) -> None:
    """``item``, ``nonzero`` and ``unique``: numbers and shapes that only the data gives, in float64 exactly."""

    def run(x: torch.Tensor) -> tuple[Any, ...]:
        return x * x[0].item(), x.nonzero().sum(), x[x > 0].cumsum(0), x.unique().mul(2)

    for x in (torch.tensor([math.pi, 0.0, -2.0, math.pi], dtype=torch.float64), torch.zeros(4, dtype=torch.float64)):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=whole, capture_scalar_outputs=whole):
            found = compile_(run)(x)
        for left, right in zip(found, run(x), strict=True):
            assert_close(left, right, rtol=1e-12, atol=0)


def test_loop_whose_length_is_data() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(x[0])):
            x = x * 1.5 + 1
        return x

    call = compile_(run)
    for count in (0.0, 3.0, 5.0):
        x = torch.tensor([count, 2.0], dtype=torch.float64)
        assert_close(call(x), run(x))


# Unusual tensors


UNUSUAL: dict[str, Callable[[torch.Tensor], Any]] = {
    "complex arithmetic": lambda z: (z * (2 + 1j)).exp() + z.conj(),
    "complex to real": lambda z: (z.real * z.imag, z.abs(), z.angle()),
    "complex product": lambda z: z @ z.mH,
    "fft": lambda z: torch.fft.fft(z) + torch.fft.ifft(z.imag),
    "view as real": lambda z: torch.view_as_complex(torch.view_as_real(z) * 3),
}


@pytest.mark.parametrize("kind", list(UNUSUAL))
def test_complex_tensors(kind: str) -> None:
    results = []
    for call in (UNUSUAL[kind], compile_(UNUSUAL[kind])):
        torch.manual_seed(0)
        z = torch.randn(3, 4, dtype=torch.complex128, requires_grad=True)
        found = torch.utils._pytree.tree_leaves(call(z))
        sum(torch.view_as_real(y).sum() if y.is_complex() else y.sum() for y in found).backward()
        results.append([*(y.detach() for y in found), z.grad])
    for left, right in zip(*results, strict=True):
        assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_tensors(layout: str) -> None:
    """Right, by eager operations if need be."""

    def run(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (a @ x.sin()).cos() + 1

    dense = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]], dtype=torch.float64)
    sparse = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
    x = torch.randn(3, 2, dtype=torch.float64)
    assert_close(compile_(run)(sparse, x), run(dense, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", some_by_default([0, 1], {0}))
def test_tensors_without_elements(size: int) -> None:
    """An empty batch (and a batch of one) through a model with its gradients."""
    plain = Tower().double()
    model = copy.deepcopy(plain)
    x = torch.randn(size, 8, dtype=torch.float64)
    found, wanted = compile_(model)(x), plain(x)
    assert found.shape == wanted.shape == (size, 4)
    found.sum().backward()
    wanted.sum().backward()
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12)


def test_reductions_of_nothing() -> None:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.sum(0), x.prod(0), x.mean(0), x.new_zeros(0, 3).any(0), torch.cat([x, x + 1]), x @ x.mT, x.softmax(1)

    for left, right in zip(compile_(run)(torch.ones(0, 3)), run(torch.ones(0, 3)), strict=True):
        assert_close(left, right, equal_nan=True)


def test_not_a_number_and_infinities_go_through() -> None:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.max(), x.softmax(0), x.clamp(-1, 1), x.relu(), x.sort().values, x == x, x.nan_to_num(7), x.round()

    x = torch.tensor([1.0, math.nan, math.inf, -math.inf, -0.0, 5e-324], dtype=torch.float64)
    for left, right in zip(compile_(run)(x), run(x), strict=True):
        assert_close(left, right, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "kind", ["integers", "booleans", "float16", "bfloat16", "no strides", "negative steps", "scalars"]
)
def test_other_dtypes_and_layouts(kind: str) -> None:
    def integers(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x // 3, x % -3, x >> 1, x * x, x.float() / 2, (x.to(torch.uint8) - 200), x.cumsum(0), x.bitwise_not()

    def booleans(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x & True, x ^ x.flip(0), x.sum(), ~x, torch.where(x, 2, 3)

    def floats(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * 2).sum(0), x.t().contiguous() + 1, x.amax(-1), x.reshape(-1)[::2] * 3

    def scalars(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * 2, x.expand(3), torch.stack([x, x + 1]).argmax(), x.item() * torch.ones(2)

    function, x = {
        "integers": (integers, torch.tensor([-7, 5, 300, -(2**62)])),
        "booleans": (booleans, torch.tensor([True, False, False])),
        "float16": (floats, torch.arange(12.0).reshape(3, 4).half()),
        "bfloat16": (floats, torch.arange(12.0).reshape(3, 4).bfloat16()),
        "no strides": (floats, torch.ones(1, 1).expand(3, 4)),
        "negative steps": (floats, torch.arange(24.0).as_strided((3, 4), (1, 3), 5)),
        "scalars": (scalars, torch.tensor(2.5, dtype=torch.float64)),
    }[kind]
    for left, right in zip(compile_(function)(x), function(x), strict=True):
        assert_close(left, right, rtol=0, atol=0)


def test_things_that_are_no_tensors_pass_through() -> None:
    def run(x: torch.Tensor, name: str, table: dict[str, Any]) -> dict[str, Any]:
        return {"name": name + "!", "x": x * len(table), "rest": [table.get("k"), None, 3]}

    found = compile_(run)(torch.ones(2), "a", {"k": (1, "b")})
    assert (found["name"], found["rest"]) == ("a!", [(1, "b"), None, 3])
    assert found["x"].tolist() == [1, 1]


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
def test_processes_that_share_a_cold_cache(tmp_path: Path, count: int) -> None:
    """All compile the same model at the same time, from the moment that the last one has started."""
    code = STEP + (
        "import os, pathlib, time\n"
        f"directory = pathlib.Path({str(tmp_path)!r})\n"
        "(directory / f'ready-{os.getpid()}').touch()\n"
        f"while len(list(directory.glob('ready-*'))) < {count}: time.sleep(0.01)\n"
        "tell(distance=step())\n"
    )
    found = results([start(code, tmp_path / "cache") for _ in range(count)])
    for each in found:
        assert each["distance"] < 1e-12 and each["graphs"] == 2 and each["fallbacks"] == []
