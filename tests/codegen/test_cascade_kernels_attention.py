"""Attention's variants and their gradients as generated kernels: against the interpreter, and against eager torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from attention_cascades import BACKWARD, FORWARD, GROUPED
from effcc.codegen.cascade_kernel import CascadeKernel, build, prepare_cascade
from effcc.codegen.tiles import crossing
from effcc.ir.cascade import rank
from effcc.ir.cascade_parser import parse_cascade
from effcc.ir.tile import Cases, Skip, walk
from fresh_seed import fresh_random
from kernel_checks import Case, attention_case

pytestmark = pytest.mark.slow  # dozens of kernels are compiled

TEXTS = {
    **FORWARD,
    "grouped": GROUPED,
    **{f"backward, {name}": text for name, text in BACKWARD.items()},
    **{f"backward apart, {name}": text for name, text in BACKWARD.items()},
}


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def cases(monkeypatch_module: pytest.MonkeyPatch) -> Mapping[str, Case]:
    source = fresh_random()
    monkeypatch_module.setattr(crossing, "threads", lambda: 2)
    found = {name: attention_case(text, source, crossing="apart" not in name) for name, text in TEXTS.items()}
    build([each.kernel for each in found.values()])
    return found


@pytest.fixture(scope="module")
def narrow() -> Mapping[str, Case]:
    source = fresh_random()
    found = {f"{name}, f32": attention_case(text, source, "f32") for name, text in TEXTS.items() if "apart" not in name}
    found |= {f"{name}, bf16": attention_case(TEXTS[name], source, "bf16") for name in ("vanilla", "causal")}
    build([each.kernel for each in found.values()])
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_float64(name: str, cases: Mapping[str, Case]) -> None:
    assert cases[name].worst() < 1e-10


@pytest.mark.parametrize("name", [name for name in TEXTS if "apart" not in name])
def test_float32(name: str, narrow: Mapping[str, Case]) -> None:
    """Within a few times the rounding of the scores, which are up to about 100 with ALiBi."""
    assert narrow[f"{name}, f32"].worst() < (2e-5 if "alibi" in name else 3e-6)


@pytest.mark.parametrize("name", ["vanilla", "causal"])
def test_bfloat16(name: str, narrow: Mapping[str, Case]) -> None:
    """One rounding of the output, about 2**-9 of it."""
    assert narrow[f"{name}, bf16"].worst() < 6e-3


@pytest.mark.parametrize("name", FORWARD)
def test_one_launch_and_nothing_stored(name: str, cases: Mapping[str, Case]) -> None:
    kernel = cases[name].kernel
    assert len(kernel.programs) == 1
    assert kernel.buffer_bytes == 0


@pytest.mark.parametrize("name", BACKWARD)
def test_launches_of_gradients(name: str, cases: Mapping[str, Case]) -> None:
    """With heads enough one launch walks keys and queries at once; else one streams keys (dQ) and one queries (dK,
    dV)."""

    def walked(kernel: CascadeKernel) -> list[list[str]]:
        return [[loop.rank.name for loop in program.loops if loop.kind == "for"] for program in kernel.programs]

    assert walked(cases[f"backward, {name}"].kernel) == [["n", "m"]]
    assert sorted(walked(cases[f"backward apart, {name}"].kernel)) == [["m"], ["n"]]


@pytest.mark.parametrize(
    ("name", "skips", "cases_"),
    [
        ("vanilla", False, False),
        ("causal", True, True),
        ("window", True, True),
        ("prefix", True, True),
        ("documents", True, True),
        ("left padding", True, True),
        ("causal, finite mask", True, True),
        ("left padding, finite", True, True),
        ("documents, finite", True, True),
        ("positions, finite", True, True),
        ("backward, documents, finite", True, True),
        ("backward, positions, finite", True, True),
        ("boolean mask", False, False),
        ("backward, causal", True, True),
    ],
)
def test_empty_tiles_are_skipped(name: str, skips: bool, cases_: bool, cases: Mapping[str, Case]) -> None:
    """Only where nothing that a tile adds can be seen."""
    for program in cases[name].kernel.programs:
        statements = list(walk(program.body))
        assert any(isinstance(item, Skip) for item in statements) == skips
        assert any(isinstance(item, Cases) for item in statements) == cases_


def attend(text: str, tensors: Mapping[str, torch.Tensor], **sizes: int) -> torch.Tensor:
    dtypes = {
        name: {torch.float32: "f32", torch.bfloat16: "bf16", torch.int64: "i64"}[t.dtype] for name, t in tensors.items()
    }
    shape = tensors["Q"].shape
    extents = {"b": shape[0], "h": shape[1], "m": shape[2], "n": tensors["K"].shape[2], "d": shape[3], "f": shape[3]}
    return prepare_cascade(parse_cascade(text), {**extents, **sizes}, dtypes)(tensors)["O"]


def operands(m: int, n: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "Q": torch.randn(1, 2, m, 64).to(dtype),
        "K": torch.randn(1, 2, n, 64).to(dtype),
        "V": torch.randn(1, 2, n, 64).to(dtype),
    }


@pytest.mark.parametrize("causal", [False, True])
def test_error_beside_eager(causal: bool) -> None:
    """Against float64, no more than twice the error of torch's own float32, or 8 units in the last place."""
    torch.manual_seed(fresh_random().randrange(2**32))
    given = operands(333, 333)
    q, k, v = given.values()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    scores = q @ k.transpose(-1, -2) * 0.125
    if causal:
        scores = scores.masked_fill(torch.ones(333, 333).triu(1).bool(), -torch.inf)
    eager = (torch.softmax(scores, -1) @ v - exact).abs().max().item()
    own = (attend(FORWARD["causal" if causal else "vanilla"], given) - exact).abs().max().item()
    assert own <= max(2 * eager, 8 * 2**-23 * exact.abs().max().item())


def test_rows_that_are_masked_altogether() -> None:
    """NaN where every key is masked by -inf; the uniform average where the mask is finite."""
    given = operands(40, 70)
    given["START"] = torch.tensor([7])
    hard = attend(FORWARD["left padding"], given)
    assert hard[:, :, :7].isnan().all()
    assert not hard[:, :, 7:].isnan().any()
    soft = attend(FORWARD["left padding, finite"], given)
    torch.testing.assert_close(
        soft[:, :, :7], given["V"].mean(2, keepdim=True).expand(-1, -1, 7, -1), atol=1e-6, rtol=1e-5
    )


def test_nan_and_infinity_in_inputs() -> None:
    """Rows that see a NaN are NaN; a position that the mask excludes contributes nothing."""
    given = operands(40, 40)
    given["K"][0, 0, 20, 3] = torch.nan
    given["Q"][0, 1, 5, 0] = torch.inf
    result = attend(FORWARD["causal"], given)
    assert result[0, 0, 20:].isnan().all()
    assert not result[0, 0, :20].isnan().any()
    q, k, v = (given[name] for name in "QKV")
    scores = (q @ k.transpose(-1, -2) * 0.125).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    eager = torch.softmax(scores, -1) @ v
    assert torch.equal(result[0, 1].isnan(), eager[0, 1].isnan())


def test_decoding_one_token() -> None:
    given = operands(1, 1000)
    result = attend(FORWARD["vanilla"], given)
    torch.testing.assert_close(result, F.scaled_dot_product_attention(*given.values()), atol=2e-6, rtol=1e-5)


def test_head_dimensions_stay_whole_and_queries_are_tiled() -> None:
    sizes = {"b": 1, "h": 8, "m": 2048, "n": 2048, "d": 64, "f": 64}
    program = prepare_cascade(parse_cascade(FORWARD["vanilla"]), sizes).programs[0]
    steps = {loop.rank: loop.step for loop in program.loops}
    assert steps[rank("b")] == steps[rank("h")] == 1
    assert steps[rank("m")] > 1 < steps[rank("n")]
    assert rank("d") not in steps
