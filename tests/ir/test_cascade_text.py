"""Cascade text: what is read, that it prints back, and what is refused where and why."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
from effcc.errors import CascadeError
from effcc.ir.cascade import Relu, Where, access, constant, rank, size
from effcc.ir.cascade_interpreter import evaluate
from effcc.ir.cascade_parser import parse_cascade
from effcc.ir.cascade_printer import print_cascade
from fresh_seed import fresh_random
from known_cascades import EXAMPLES, KNOWN, REFUSED
from random_cascades import random_cascade


@pytest.mark.parametrize("text", [*(k.text for k in KNOWN.values()), *(r[0] for r in REFUSED.values())])
def test_known_cascades_print_and_read_back(text: str) -> None:
    cascade = parse_cascade(text)
    assert parse_cascade(print_cascade(cascade)) == cascade


def test_random_cascades_print_and_read_back() -> None:
    source = fresh_random()
    for _ in range(100):
        seed = source.getrandbits(32)
        cascade = random_cascade(seed)
        assert parse_cascade(print_cascade(cascade)) == cascade, f"seed {seed}"


def test_every_part_of_the_language() -> None:
    """Each expression is read into these nodes, and prints back to an equal cascade."""
    n, m, x = rank("n"), rank("m"), access("X", [rank("n")])
    y = access("Y", [rank("n")])
    cases = {
        "1e-3*X[n] - inf*Y[n]": x / 1000 - sympy.oo * y,
        "-X[n]**2": -(x**2),
        "(-X[n])**2": x**2,
        "2**-1*X[n]": x / 2,
        "X[n]/Y[n]/2": x / y / 2,
        "X[n] - (Y[n] - 1)": x - y + 1,
        "|n|*X[n]": size("n") * x,
        "where(n <= 3, X[n], nan)": None,
        "rsqrt(X[n]) + sqrt(Y[n])": x ** sympy.Rational(-1, 2) + sympy.sqrt(y),
        "relu(X[n])*round(Y[n])": None,
        "max(X[n], min(Y[n], 0))": None,
        "sigmoid(X[n]) + tanh(Y[n]) + abs(X[n])": None,
        "(X[n] == Y[n]) + (X[n] != 1) + (X[n] > 2) + (X[n] >= Y[n]) + (X[n] < 0)": None,
        "K[c*B+j] + K[2*n + 1]": None,
        "exp(log(1 + abs(X[n])))": 1 + sympy.Abs(x),
        ".5*X[n] + 1.25": x / 2 + sympy.Rational(5, 4),
    }
    for text, expected in cases.items():
        indices = "c,j,n" if "c*B" in text else "n"
        cascade = parse_cascade(f"Z[{indices}] = {text}\n")
        if expected is not None:
            assert cascade.einsums[0].body == expected, text
        assert parse_cascade(print_cascade(cascade)) == cascade, text
    (einsum,) = parse_cascade("Z[m] = prod[n, k] where(m == n, relu(K[k*B+n]), 1)  # a comment\n").einsums
    assert (einsum.reduction, einsum.reduced, einsum.kept) == ("prod", (n, rank("k")), (m,))
    assert isinstance(einsum.body, Where) and isinstance(einsum.body.args[1], Relu)
    assert einsum.body.args[1].args[0] == access("K", [rank("k") * constant("B") + n])


#: text -> (line, column, part of the message).
_BAD = {
    "Y[m] = sum[n] X[m,n] +": (1, 23, "expected an expression"),
    "Y[m] = sum[n] X[m,n] )": (1, 22, "unexpected ')'"),
    "y[m] = X[m]": (1, 1, "expected a tensor"),
    "Y[M] = X[m]": (1, 2, "an output index"),
    "Y[m] = X[m,n]": (1, 1, "rank n is neither kept nor reduced"),
    "Y[m] = sum[m] X[m]": (1, 1, "both kept and reduced"),
    "Y[m,m] = X[m]": (1, 1, "twice in the output"),
    "Y[m] = sum[n,n] X[m,n]": (1, 8, "reduced twice"),
    "# fine\n\n  Y[] = foo(X[])": (3, 9, "unknown function foo"),
    "Y[] = exp(X[], 2)": (1, 7, "takes 1 argument"),
    "Y[] = X[] $ 2": (1, 11, "unexpected character"),
    "Y[] = X[]\nY[] = X[]": (2, 1, "written twice"),
    "Y[] = Z[]\nZ[] = X[]": (1, 1, "read before it is written"),
    "Y[] = X[]\nZ[m] = X[m]": (2, 1, "ranks elsewhere"),
    "Y[n] = X[n*n]": (1, 10, "affine"),
    "Y[n] = X[n/2]": (1, 10, "whole coefficients"),
    "Y[n] = Y[n]": (1, 1, "reads itself"),
    "R[c+1] = R[c] + X[c]": (1, 1, "no start"),
    "R[0] = 1": (1, 1, "no step"),
    "R[1] = 1\nR[c+1] = R[c]": (1, 1, "does not start at 0"),
    "R[0] = 1\nR[c+1] = R[c+1] + 1": (2, 1, "may read itself only at c"),
    "Y[] = X[]/0": (1, 11, "division by zero"),
    "Y[] = log(0)*X[]": (1, 7, "no real value"),
    "Y[] = sqrt(-1)*X[]": (1, 7, "no real value"),
    "Y[] = 9**9**9": (1, 10, "too large"),
    "Y[] = ((2**400)**400)**400": (1, 18, "too large"),
    "Y[] = 1e999": (1, 7, "too large"),
    "Y[] = " + "(" * 200 + "X[]" + ")" * 200: (1, None, "too deeply"),
    "Y[] = 1 < 2 < X[]": (1, 13, "do not chain"),
    "Y[] = sum X[]": (1, 7, "is a function"),
    "Y[m = X[m]": (1, 5, "expected"),
    "Y": (1, 2, "expected"),
}


@pytest.mark.parametrize("text", _BAD)
def test_bad_text_is_refused_with_line_column_and_remedy(text: str) -> None:
    line, column, message = _BAD[text]
    with pytest.raises(CascadeError) as caught:
        parse_cascade(text, "some.cascade")
    name, at_line, at_column = caught.value.where.split(":")
    assert message in caught.value.message and caught.value.remedy
    assert (name, int(at_line)) == ("some.cascade", line)
    assert column is None or int(at_column) == column


def test_nothing_is_evaluated_as_python() -> None:
    with pytest.raises(CascadeError):
        parse_cascade("Y[] = __import__('os').system('true')")


def test_the_examples_are_cascades() -> None:
    for file in sorted(EXAMPLES.glob("*.cascade")):
        assert parse_cascade(file.read_text(), file.name).einsums


# The interpreter ------------------------------------------------------------------------------------------------------


def test_attention_equals_numpy() -> None:
    generator = np.random.default_rng(fresh_random().getrandbits(64))
    q, k, v = generator.normal(size=(3, 4)), generator.normal(size=(6, 4)), generator.normal(size=(6, 2))
    scores = q @ k.T
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True) @ v
    inputs = {"Q": q, "K": k, "V": v}
    whole = evaluate(parse_cascade(KNOWN["stable softmax attention"].text), inputs)
    steps = evaluate(parse_cascade(KNOWN["online softmax, one key a step"].text), inputs)
    chunks = evaluate(parse_cascade(KNOWN["FlashAttention-2"].text), inputs, {"c": 3, "j": 2, "B": 2})
    for found in (whole, steps, chunks):
        np.testing.assert_allclose(found["AV"], expected, rtol=1e-12)


def test_functions_equal_numpy() -> None:
    x = np.random.default_rng(fresh_random().getrandbits(64)).normal(size=50) * 3
    text = "A[n] = sigmoid(X[n]) + relu(X[n])*round(X[n]) - tanh(X[n])/abs(X[n]) + where(X[n] > 1, X[n]**3, 2**X[n])\n"
    text += (
        "B[] = prod[n] (X[n] + 1)\nC[] = min[n] max(X[n], -1)\nD[n] = where(n >= 1, X[n-1], 0) + log(1 + X[n]**2)/|n|\n"
    )
    found = evaluate(parse_cascade(text), {"X": x})
    first = 1 / (1 + np.exp(-x)) + np.maximum(x, 0) * np.round(x) - np.tanh(x) / np.abs(x)
    np.testing.assert_allclose(found["A"], first + np.where(x > 1, x**3, 2**x), rtol=1e-12)
    np.testing.assert_allclose(found["B"], np.prod(x + 1), rtol=1e-10)
    assert found["C"] == np.maximum(x, -1).min()
    np.testing.assert_allclose(found["D"], np.r_[0, x[:-1]] + np.log1p(x**2) / 50, rtol=1e-12)


def test_a_recurrence_through_several_einsums() -> None:
    """The delta rule of linear attention: each step's prediction reads the state that the last step wrote."""
    text = """
S[d,f,0] = 0
P[c,f] = sum[d] S[d,f,c] * K[c,d]
S[d,f,c+1] = S[d,f,c] + K[c,d] * (V[c,f] - P[c,f])
O[c,f] = sum[d] S[d,f,c+1] * Q[c,d]
"""
    generator = np.random.default_rng(fresh_random().getrandbits(64))
    q, k, v = (generator.normal(size=(5, size)) for size in (3, 3, 2))
    state, expected = np.zeros((3, 2)), []
    for step in range(5):
        state = state + np.outer(k[step], v[step] - k[step] @ state)
        expected.append(q[step] @ state)
    found = evaluate(parse_cascade(text), {"Q": q, "K": k, "V": v})
    np.testing.assert_allclose(found["O"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "inputs", "message"),
    [
        ("Y[] = sum[n] X[n]*Z[n]", {"X": (3,)}, "no value for the input Z"),
        ("Y[] = sum[n] X[n]*Z[n]", {"X": (3,), "Z": (4,)}, "rank n is 3"),
        ("Y[] = sum[n] X[n]", {"X": (3, 3)}, "1 ranks, the array 2"),
        ("Y[] = sum[c,j] X[c*B+j]", {"X": (6,)}, "size of rank"),
        ("Y[] = sum[n] X[n]*B", {"X": (6,)}, "B has no value"),
    ],
)
def test_what_cannot_be_evaluated_says_why(text: str, inputs: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        evaluate(parse_cascade(text), {name: np.ones(shape) for name, shape in inputs.items()})
