"""Tables in generated C++: looked up where an index says, and summed into, without a loop over their places."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from effcc.codegen.cascade_kernel import build
from effcc.codegen.tiles import crossing
from fresh_seed import fresh_random
from kernel_checks import Case, case

_LOOKED_UP = """
E[h,m,n] = sum[t] where(t == I[m,n], T[t,h], 0)
QK[h,m,n] = sum[d] Q[h,m,d] * K[h,n,d]
"""
_GRADIENTS = """
P[h,m,n] = exp(QK[h,m,n] + E[h,m,n] - L[h,m])
DP[h,m,n] = sum[f] DO[h,m,f] * V[h,n,f]
DS[h,m,n] = P[h,m,n] * (DP[h,m,n] - D[h,m])
"""
_SUMMED = "B[h,l] = sum[m,n] where((I[m,n] != 3) * (l == I[m,n]), DS[h,m,n], 0)\n"
#: What is computed, and from which tensors beyond normal ones.
TEXTS = {
    "a bias": _LOOKED_UP
    + """
S[h,m,n] = QK[h,m,n] + E[h,m,n]
M[h,m] = max[n] S[h,m,n]
W[h,m,n] = exp(S[h,m,n] - M[h,m])
SW[h,m] = sum[n] W[h,m,n]
A[h,m,n] = W[h,m,n] / SW[h,m]
O[h,m,f] = sum[n] A[h,m,n] * V[h,n,f]
""",
    "all gradients": _LOOKED_UP
    + _GRADIENTS
    + """
DV[h,n,f] = sum[m] P[h,m,n] * DO[h,m,f]
DQ[h,m,d] = sum[n] DS[h,m,n] * K[h,n,d]
DK[h,n,d] = sum[m] DS[h,m,n] * Q[h,m,d]
"""
    + _SUMMED,
    "the table's gradient": _LOOKED_UP + _GRADIENTS + _SUMMED,
    "an affine index": _LOOKED_UP.replace("I[m,n]", "n - m + 20")
    + _GRADIENTS
    + _SUMMED.replace("I[m,n]", "n - m + 20"),
    "rows": "Y[j,d] = sum[t] where(t == J[j], X[t,d], 0) * R[j]\nZ[t,d] = sum[j] where(t == J[j], G[j,d], 0)\n",
    "an element of each row": """
Y[j] = sum[t] where(t == J[j], X2[j,t] * t, 0)
Z[t] = sum[j] where(t == J[j], R[j], 0)
""",
    "columns that differ": """
Y[j,d] = sum[t] where(t == C[j,d], X[t,d], 0)
Z[t,d] = sum[j] where(t == C[j,d], G[j,d], 0)
""",
}
#: (text, type, places of its tables): registers hold 32.
QUICK = {
    f"{text}, {dtype}": (text, dtype, places)
    for text, dtype, places in (("all gradients", "f32", 29), ("columns that differ", "f64", 37), ("rows", "bf16", 31))
}
SLOW = {f"{text}, f64": (text, "f64", 17 if text == "rows" else 37) for text in TEXTS} | {
    f"{text}, {dtype}": (text, dtype, places)
    for text, dtype, places in (
        ("an element of each row", "bf16", 40), ("a bias", "bf16", 30), ("columns that differ", "f32", 300),
        ("all gradients", "f32", 45), ("rows", "f32", 31),
    )
}  # fmt: skip


def made(source: Any, text: str, dtype: str, places: int) -> Case:
    """Indices of which some are no place of the table."""
    generator = np.random.default_rng(source.randrange(2**32))
    sizes = {
        "h": 2, "m": source.randint(33, 64), "n": source.randint(65, 128), "d": source.randint(17, 24), "f": 20,
        "t": places, "l": places, "j": source.randint(65, 128),
    }  # fmt: skip
    shapes = {"I": (sizes["m"], sizes["n"]), "J": (sizes["j"],), "C": (sizes["j"], sizes["d"])}
    given: dict[str, Any] = {
        name: generator.integers(-3, places + 3, size=shape) for name, shape in shapes.items() if f"{name}[" in text
    }
    if "L[h,m]" in text:
        given["L"] = 8 + generator.normal(size=(2, sizes["m"]))
    return case(text, sizes, generator, dtype, given)


@pytest.fixture(scope="module")
def cases() -> Mapping[str, Case]:
    return built(QUICK)


@pytest.fixture(scope="module")
def more() -> Mapping[str, Case]:
    return built(SLOW)


def built(kinds: Mapping[str, tuple[str, str, int]]) -> Mapping[str, Case]:
    source = fresh_random()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossing, "threads", lambda: 2)
        found = {name: made(source, TEXTS[text], dtype, places) for name, (text, dtype, places) in kinds.items()}
    build([each.kernel for each in found.values()])
    return found


def error_of_pytorch(found: Case) -> float:
    """How far "all gradients" is off as PyTorch computes it in the kernel's type, measured as the kernel's error is."""
    given, reference = found.tensors(), found.reference()
    index, places = given["I"], found.sizes["t"]
    inside = (index >= 0) & (index < places)
    looked_up = torch.where(inside, given["T"][index.clamp(0, places - 1)].permute(2, 0, 1), 0.0)
    p = torch.exp(given["Q"] @ given["K"].mT + looked_up - given["L"][..., None])
    ds = p * (given["DO"] @ given["V"].mT - given["D"][..., None])
    summed = inside & (index != 3)
    table = torch.zeros(ds.shape[0], places, dtype=ds.dtype).index_add_(1, index[summed], ds[:, summed])
    own = {"DV": p.mT @ given["DO"], "DQ": ds @ given["K"], "DK": ds.mT @ given["Q"], "B": table}
    return max(
        float(np.abs(value.double().numpy() - reference[name]).max()) / max(1.0, float(np.abs(reference[name]).max()))
        for name, value in own.items()
    )


def check(name: str, found: Case) -> None:
    """Results are as the sums say, that is nothing for an index out of range; bfloat16 is one rounding of the output.
    Places are walked where a table is set to 0 or written, but nowhere compared with an index."""
    limit = {"f64": 1e-10, "f32": 5e-6}.get(found.dtype, 6e-3)
    if name.startswith("all gradients, f32"):  # exponentials of large products: PyTorch itself may be further off
        limit = max(limit, 1.5 * error_of_pytorch(found))
    assert found.worst() < limit, name
    source = found.kernel.source
    own = source[source.rindex("}  // namespace\n") :]
    assert re.search(r"looked_up|ShortTable|add_in_lanes|add_each|add_row", own)
    assert not re.search(r"counting\(scalar_t\(\(?(o_[tl] \+ )?i_[tl]\)?\)\)", own)


@pytest.mark.parametrize("name", QUICK)
def test_results(name: str, cases: Mapping[str, Case]) -> None:
    check(name, cases[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_results(name: str, more: Mapping[str, Case]) -> None:
    check(name, more[name])


def test_gradients_are_one_launch(cases: Mapping[str, Case]) -> None:
    """The table's gradient is summed up in the tiles that the others walk."""
    assert len(cases["all gradients, f32"].kernel.programs) == 1
    assert cases["all gradients, f32"].kernel.buffer_bytes == 0


def test_sums_repeat_to_the_last_bit(cases: Mapping[str, Case]) -> None:
    found = cases["all gradients, f32"]
    first, second = (found.kernel(found.tensors())["B"] for _ in range(2))
    assert first.equal(second)
