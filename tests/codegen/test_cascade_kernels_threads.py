"""How kernels share work among threads: parts of a streamed rank merged, and sums of several workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from attention_cascades import FORWARD
from effcc.codegen.cascade_kernel import build, prepare_cascade
from effcc.codegen.tiles import crossing, roles
from effcc.ir.cascade_parser import parse_cascade
from fresh_seed import fresh_random
from kernel_checks import Case, case
from known_cascades import KNOWN

pytestmark = pytest.mark.slow  # dozens of kernels are compiled

GRADIENTS = KNOWN["gradients of linear and cross-entropy, L saved"].text
#: One query or few over a long fiber, and fibers with nothing beside them.
SPLIT = {
    **{name: FORWARD[name] for name in ("vanilla", "causal", "softcap", "sigmoid", "sink", "left padding")},
    "layer norm and dot product": KNOWN["layernorm, then a dot product"].text,
    "covariance": KNOWN["covariance"].text,
    "entropy": KNOWN["entropy"].text,
}


@pytest.fixture(scope="module")
def five_threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (crossing, roles):
            patch.setattr(module, "threads", lambda: 5)
        yield


def split_case(text: str, source: Any) -> Case:
    sizes = {"b": 1, "h": 1, "m": source.choice([1, 3]), "n": source.randint(700, 900), "d": 8, "f": 5}
    if "LN[m,d]" in text:
        sizes.update({"d": sizes["n"], "m": 2})
    given = {"START": np.array([source.randint(0, 3)])}
    return case(text, sizes, np.random.default_rng(source.randrange(2**32)), given=given)


@pytest.fixture(scope="module")
def cases(five_threads: None) -> Mapping[str, Case]:
    source = fresh_random()
    found = {name: split_case(text, source) for name, text in SPLIT.items()}
    build([each.kernel for each in found.values()])
    return found


@pytest.mark.parametrize("name", SPLIT)
def test_parts_merge_to_the_whole(name: str, cases: Mapping[str, Case]) -> None:
    kernel = cases[name].kernel
    assert any(loop.part is not None for program in kernel.programs for loop in program.loops)
    assert kernel.buffer_bytes > 0
    assert cases[name].worst() < 1e-10


def test_sums_of_several_workers(five_threads: None) -> None:
    """The gradient of the input sums over words, of the weight over tokens: one launch, workers' sums added up, and
    the same bits each time."""
    source = fresh_random()
    sizes = {"t": source.randint(65, 128), "v": source.randint(300, 400), "d": 24}
    given = {"T": np.array([source.randrange(sizes["v"]) for _ in range(sizes["t"])])}
    made = case(GRADIENTS, sizes, np.random.default_rng(source.randrange(2**32)), given=given)
    assert len(made.kernel.programs) == 1
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert made.worst() < 1e-10
            first, second = (made.kernel(made.tensors())["DH"] for _ in range(2))
            assert torch.equal(first, second)
    finally:
        torch.set_num_threads(before)


def test_nothing_is_split_that_fills_the_threads() -> None:
    sizes = {"b": 4, "h": 64, "m": 128, "n": 4096, "d": 64, "f": 64}
    kernel = prepare_cascade(parse_cascade(FORWARD["vanilla"]), sizes)
    assert len(kernel.programs) == 1
    assert kernel.buffer_bytes == 0
