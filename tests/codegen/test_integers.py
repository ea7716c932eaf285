"""Integers that float32 does not tell apart are compared exactly, or refused."""

from __future__ import annotations

import pytest
import torch
from effcc.codegen.cascade_kernel import compile_cascade
from effcc.codegen.integers import compared_integers
from effcc.errors import ShapeError
from effcc.ir.cascade_parser import parse_cascade

DOCUMENTS = """
S[m,n] = where(I[m] == J[n], X[m,n], 0)
Y[m] = sum[n] S[m,n]
"""


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        (DOCUMENTS, ["I", "J"]),
        ("Y[m] = sum[n] where(I[m] == n, X[m,n], 0)", []),
        ("Y[m] = sum[n] where(I[m] == 20000000, X[m,n], 0)", ["I"]),
        ("D[m,n] = I[m] - J[n]\nY[m] = sum[n] where(D[m,n] < 5, X[m,n], 0)", ["I", "J"]),
        ("Y[m] = sum[n] I[m] * X[m,n]", []),
    ],
)
def test_which_are_compared(text: str, compared: list[str]) -> None:
    cascade = parse_cascade(text)
    assert compared_integers(cascade, [name for name in ("I", "J") if name in cascade.inputs]) == compared


@pytest.mark.parametrize("base", [0, 1 << 24, 1 << 40])
def test_large_integers_are_told_apart(base: int) -> None:
    kernel = compile_cascade(
        parse_cascade(DOCUMENTS), sizes={"m": 70, "n": 90}, dtypes={"I": "i64", "J": "i64", "X": "f32"}
    )
    left, right = base + torch.randint(0, 3, (70,)), base + torch.randint(0, 3, (90,))
    x = torch.randn(70, 90)
    found = kernel({"I": left, "J": right, "X": x})["Y"]
    wanted = torch.where(left[:, None] == right, x.double(), 0.0).sum(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_integers_beyond_float64_are_refused() -> None:
    kernel = compile_cascade(parse_cascade(DOCUMENTS), sizes={"m": 4, "n": 4}, dtypes={"I": "i64", "J": "i64"})
    ids = (1 << 60) + torch.arange(4)
    with pytest.raises(ShapeError, match="cannot tell apart"):
        kernel({"I": ids, "J": ids, "X": torch.randn(4, 4)})
