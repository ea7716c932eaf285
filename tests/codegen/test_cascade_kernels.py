"""Generated C++ kernels against the cascade interpreter, in float64: every known cascade, and random ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from effcc.codegen.cascade_kernel import build, compile_cascade, prepare_cascade
from effcc.codegen.tiles.errors import NotLowerable
from effcc.errors import ShapeError
from effcc.ir.cascade import rank
from effcc.ir.cascade_parser import parse_cascade
from fresh_seed import fresh_random
from kernel_checks import SMALL_CACHES, TEXTS, Case, case, known_case
from random_cascades import random_text

pytestmark = pytest.mark.slow  # dozens of kernels are compiled


@pytest.fixture(scope="module")
def cases() -> Mapping[str, Case]:
    source = fresh_random()
    found = {name: known_case(name, source) for name in TEXTS}
    build([each.kernel for each in found.values()])
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_known(name: str, cases: Mapping[str, Case]) -> None:
    assert cases[name].worst() < 1e-10


@pytest.mark.parametrize(
    "name", ["stable softmax attention", "softcap", "attention with a sink", "entropy", "covariance"]
)
def test_one_pass_is_one_launch(name: str, cases: Mapping[str, Case]) -> None:
    """What was rewritten into one pass over its long rank is one launch, and leaves nothing between launches."""
    kernel = cases[name].kernel
    assert len(kernel.programs) == 1
    assert kernel.buffer_bytes == 0


def test_random_cascades() -> None:
    """Random chains of dependent reductions, in small sizes and in such as need several tiles."""
    source = fresh_random()
    found = []
    for _ in range(6):
        text = random_text(source.randrange(2**32))
        print(text)
        sizes = {"m": source.choice([1, 2, 20]), "n": source.choice([1, 7, 90]), "f": source.choice([3, 18]), "p": 3}
        found.append(case(text, sizes, np.random.default_rng(source.randrange(2**32))))
    build([each.kernel for each in found])
    for each in found:
        assert each.worst() < 1e-9


@pytest.mark.parametrize(
    ("number", "value"), [("round(0)", 0.0), ("where(1 < 0, 3, 5)", 5.0), ("max(round(2), 3)*sigmoid(0)", 1.5)]
)
def test_functions_of_numbers(number: str, value: float) -> None:
    cascade = parse_cascade(f"T[n] = where({number} < 1, X[n], 2*X[n])\nY[n] = T[n] + {number}\n")
    x = torch.randn(37, dtype=torch.float64)
    found = compile_cascade(cascade, {"n": 37}, "f64")({"X": x})["Y"]
    torch.testing.assert_close(found, (x if value < 1 else 2 * x) + value)


def test_sums_over_a_rank_that_others_keep() -> None:
    """``T2`` is re-based from step to step and sums over ``m`` within a step; ``T5`` keeps ``m``, in tiles."""
    text = "\n".join(
        [
            "T0[] = sum[n] Y[n]",
            "T2[f] = sum[n,m] (S[m,n] - T0[])*X[n]*G[f]",
            "T3[] = sum[n,f] Y[n]*T2[f]",
            "T5[m] = min[n] S[m,n] + T3[]",
        ]
    )
    generator = np.random.default_rng(fresh_random().randrange(2**32))
    found = [case(text, {"m": m, "n": n, "f": 2}, generator) for m, n in ((200, 3), (70, 90))]
    build([each.kernel for each in found])
    for each in found:
        assert each.worst() < 1e-9


@pytest.mark.slow
def test_many_random_cascades() -> None:
    source = fresh_random()
    for _ in range(10):
        found = []
        for _ in range(20):
            text = random_text(source.randrange(2**32))
            sizes = {each: source.choice([1, 2, 7, 17, 90, 200]) for each in "mnfp"}
            print(text, sizes)
            found.append(case(text, sizes, np.random.default_rng(source.randrange(2**32))))
        build([each.kernel for each in found])
        for each in found:
            assert each.worst() < 1e-9


def test_writes_into_given_tensors_with_strides() -> None:
    cascade = parse_cascade("S[m] = sum[n] X[m,n]\nY[m,n] = X[m,n] - S[m]\n")
    kernel = compile_cascade(cascade, {"m": 5, "n": 7}, "f64", units={"X": None, "Y": None})
    x = torch.randn(7, 5, dtype=torch.float64).t()
    whole = torch.zeros(5, 14, dtype=torch.float64)
    result = kernel({"X": x}, out={"Y": whole[:, ::2]})
    torch.testing.assert_close(result["Y"], x - x.sum(1, keepdim=True))
    assert result["Y"].data_ptr() == whole.data_ptr()
    assert (whole[:, 1::2] == 0).all()


def test_tensors_that_do_not_fit_are_refused() -> None:
    kernel = prepare_cascade(parse_cascade("S[m] = sum[n] X[m,n]\n"), {"m": 5, "n": 7}, "f64")
    with pytest.raises(ShapeError, match="no value for the input X"):
        kernel({})
    with pytest.raises(ShapeError, match="made for f64"):
        kernel({"X": torch.zeros(5, 7)})
    with pytest.raises(ShapeError, match="not neighbours"):
        kernel({"X": torch.zeros(7, 5, dtype=torch.float64).t()})


def test_too_long_for_exact_comparisons() -> None:
    with pytest.raises(NotLowerable, match="too long"):
        prepare_cascade(parse_cascade("S[] = sum[n] X[n]\n"), {"n": 1 << 24}, "f32")


def test_an_output_that_rewriting_removed_is_refused_by_name() -> None:
    with pytest.raises(NotLowerable, match="does not compute A"):
        prepare_cascade(parse_cascade(TEXTS["stable softmax attention"]), dict.fromkeys("mndf", 4), outputs=["A"])


def test_lies_in_scratch_and_buffers_only() -> None:
    """Scores of 4096 x 4096 are never in memory: what threads and launches need does not grow with their product."""
    text = TEXTS["stable softmax attention"]
    sizes = {"m": 4096, "n": 4096, "d": 64, "f": 64}
    kernel = prepare_cascade(parse_cascade(text), sizes)
    assert kernel.buffer_bytes == 0
    assert kernel.scratch_bytes < 4 << 20
    assert rank("n") in {loop.rank for loop in kernel.programs[0].loops}


def test_small_caches_make_small_tiles() -> None:
    kernel = prepare_cascade(
        parse_cascade(TEXTS["stable softmax attention"]), {"m": 256, "n": 256, "d": 8, "f": 8}, caches=SMALL_CACHES
    )
    assert {loop.step for loop in kernel.programs[0].loops} == {16, 64}
