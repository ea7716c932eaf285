"""Rewriting keeps the numbers good: data far from 0 in float32, infinities, masks, what deferral would have done."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import sympy
from effcc.ir.cascade import rank
from effcc.ir.cascade_interpreter import Array, evaluate, evaluate_expression, rank_sizes
from effcc.ir.cascade_parser import parse_cascade
from effcc.ir.monoid_interpreter import block_state, merge_states, results
from effcc.passes.cascade_analysis import group_of, rank_passes
from effcc.passes.intervals import tensor_intervals
from effcc.passes.rewrite_cascade import Rewriting, rewrite
from effcc.passes.separable_rank import decompose, separate
from effcc.passes.summand import summand
from fresh_seed import fresh_random
from known_cascades import KNOWN

_LAYERNORM_DOT = """
MU[m]  = sum[d] X[m,d] / |d|
VR[m]  = sum[d] (X[m,d] - MU[m])**2 / |d|
Y[m,f] = sum[d] (X[m,d] - MU[m]) * rsqrt(VR[m] + 1e-5) * W[d,f]
"""
_OFFSET = {
    "variance": (KNOWN["variance"].text, "V", {"X": (2048,)}),
    "covariance": (KNOWN["covariance"].text, "CV", {"X": (2048,), "Y": (2048,)}),
    "layernorm-dot": (_LAYERNORM_DOT, "Y", {"X": (2, 2048), "W": (2048, 4)}),
}


def _split(rewriting: Rewriting, inputs: Mapping[str, Array], output: str, block: int) -> Array:
    """The output in float32, from blocks of the fiber that are merged pairwise."""
    (monoid,) = rewriting.monoids
    sizes = rank_sizes(rewriting.cascade, inputs, {})
    extent = sizes[monoid.rank.name]
    blocks = [np.arange(at, min(at + block, extent)) for at in range(0, extent, block)]
    states = [block_state(monoid, inputs, sizes, each, np.float32) for each in blocks]
    while len(states) > 1:
        pairs = zip(states[::2], states[1::2], strict=True)
        states = [merge_states(monoid, left, right, inputs, sizes, np.float32) for left, right in pairs]
    return results(monoid, states[0], inputs, sizes, np.float32)[output]


@pytest.mark.parametrize("name", _OFFSET)
def test_mean_a_thousand_times_sigma_in_float32(name: str) -> None:
    """The error is at most twice that of the cascade as written (root mean square of many trials), or 2 roundings."""
    text, output, shapes = _OFFSET[name]
    cascade = parse_cascade(text)
    rewriting = rewrite(cascade)
    generator = np.random.default_rng(fresh_random().getrandbits(64))
    errors = []
    for _ in range(12):
        inputs = {tensor: generator.normal(size=shape).astype(np.float32) for tensor, shape in shapes.items()}
        inputs.update({tensor: inputs[tensor] + np.float32(1000) for tensor in ("X", "Y") if tensor in inputs})
        exact = evaluate(cascade, inputs)[output]
        written = evaluate(cascade, inputs, dtype=np.float32)[output]
        found = _split(rewriting, inputs, output, 128)
        # Of the magnitude that the products sum up to: a covariance of independent data is near 0.
        scale = max(1.0, float(np.abs(exact).max()))
        errors.append([float(np.abs(value - exact).max()) / scale for value in (written, found)])
    eager, ours = np.sqrt(np.mean(np.square(errors), axis=0))
    assert ours <= 2 * eager + 2 * 2.0**-24, (eager, ours)


def test_plain_deferral_of_layernorm_dot_is_refused_with_reason() -> None:
    """Its certificate separates the summand all the same; evaluated as it stands in float32, that is far off."""
    cascade = parse_cascade(_LAYERNORM_DOT)
    rewriting = rewrite(cascade)
    certificate = next(each for each in rewriting.certificates if each.einsum == "Y")
    assert (certificate.mode, certificate.k) == ("rebase", 2)
    assert certificate.conditions["error_bounded"] and "no_cancellation" not in certificate.conditions
    # Deferral by hand: sums of g over d in float32, then h.
    generator = np.random.default_rng(fresh_random().getrandbits(64))
    deferred, rebased = [], []
    for _ in range(6):
        inputs = {
            "X": (1000 + generator.normal(size=(1, 2048))).astype(np.float32),
            "W": generator.normal(size=(2048, 1)).astype(np.float32),
        }
        exact = evaluate(cascade, inputs)
        values = {
            sympy.Symbol("X", real=True): inputs["X"][0],
            sympy.Symbol("W", real=True): inputs["W"][:, 0],
            sympy.Symbol("MU", real=True): exact["MU"].astype(np.float32),
            sympy.Symbol("VR", nonnegative=True): exact["VR"].astype(np.float32),
        }
        total = np.float32(0)
        for g, h in zip(certificate.g, certificate.h, strict=True):
            total += np.sum(evaluate_expression(g, values, np.float32)) * evaluate_expression(h, values, np.float32)
        deferred.append(float(np.abs(total - exact["Y"]).max()))
        rebased.append(float(np.abs(_split(rewriting, inputs, "Y", 128) - exact["Y"]).max()))
    assert np.mean(deferred) > 100 * np.mean(rebased)


def test_a_bounded_score_needs_no_maximum() -> None:
    """Softcap keeps scores within 30, so their exponentials cannot overflow: plain sums, nothing to rescale."""
    certificates = rewrite(parse_cascade(KNOWN["softcap"].text)).certificates
    assert {certificate.mode for certificate in certificates} == {"defer"}
    unbounded = rewrite(parse_cascade(KNOWN["stable softmax attention"].text)).certificates
    assert {certificate.mode for certificate in unbounded} == {"rebase"}
    assert all(certificate.conditions["transition_bounded"] for certificate in unbounded)


def test_terms_of_one_sign_are_deferred_and_others_are_not() -> None:
    one_sign = "M[] = sum[n] X[n]**2\nY[] = sum[n] X[n]**2 + M[]\n"
    (certificate,) = rewrite(parse_cascade(one_sign)).certificates
    assert (certificate.mode, certificate.k, certificate.conditions["no_cancellation"]) == ("defer", 2, True)
    any_sign = "M[] = sum[n] X[n]\nY[] = sum[n] X[n] + M[]\n"
    (certificate,) = rewrite(parse_cascade(any_sign)).certificates
    assert (certificate.mode, certificate.k) == ("rebase", 2)


def test_a_product_of_two_cancelling_sums_is_refused() -> None:
    text = "A[] = sum[n] X[n]\nB[] = sum[n] Y[n]\nR[] = sum[n] (X[n]*A[] - Y[n]*B[]) * (Y[n]*A[] - X[n]*B[])\n"
    rewriting = rewrite(parse_cascade(text))
    assert rewriting.certificates == () and "cancel" in rewriting.refusals[0].why


def test_bounds_are_proven_for_any_input() -> None:
    """Bounds of every tensor hold for values drawn from a wide distribution."""
    cascade = parse_cascade(
        """
A[n] = 30 * tanh(X[n] / 30)
B[]  = max[n] A[n]
C[n] = exp(A[n] - B[])
D[]  = sum[n] C[n]
E[n] = sigmoid(X[n]) - 2
F[]  = sum[n] E[n]
G[n] = where(X[n] > 0, X[n]**2, 1/2)
H[n] = relu(X[n]) + abs(X[n])
I[n] = round(A[n])
J[n] = log(1 + X[n]**2)
K[n] = min(A[n], 1) * max(A[n], -1)
"""
    )
    bounds = tensor_intervals(cascade)
    assert (bounds["A"].low, bounds["A"].high) == (-30.0, 30.0)
    assert bounds["D"].positive and bounds["F"].negative and bounds["G"].low == 0 and bounds["J"].low == 0
    generator = np.random.default_rng(fresh_random().getrandbits(64))
    values = evaluate(cascade, {"X": generator.standard_cauchy(500) * 10})
    for name, bound in bounds.items():
        assert values[name].min() >= bound.low - 1e-9 and values[name].max() <= bound.high + 1e-9, name


# Infinities and masks ------------------------------------------------------------------------------------------------

_SCORES = "QK[m,n] = sum[d] Q[m,d] * K[n,d]\n"
_MASKED = {
    "before the maximum": """
S[m,n]  = where(n < M[m], QK[m,n], -inf)
GM[m]   = max[n] S[m,n]
SD[m]   = sum[n] exp(S[m,n] - GM[m])
AV[m,f] = sum[n] exp(S[m,n] - GM[m]) / SD[m] * V[n,f]
""",
    "after the exponential": """
GM[m]   = max[n] where(n < M[m], QK[m,n], -inf)
SN[m,n] = where(n < M[m], exp(QK[m,n] - GM[m]), 0)
SD[m]   = sum[n] SN[m,n]
AV[m,f] = sum[n] SN[m,n] / SD[m] * V[n,f]
""",
    "after the softmax": """
S[m,n]  = where(n < M[m], QK[m,n], -inf)
GM[m]   = max[n] S[m,n]
SD[m]   = sum[n] exp(S[m,n] - GM[m])
A[m,n]  = where(n < M[m], exp(S[m,n] - GM[m]) / SD[m], 0)
AV[m,f] = sum[n] A[m,n] * V[n,f]
""",
    "added, finite": """
S[m,n]  = QK[m,n] + where(n < M[m], 0, -1e30)
GM[m]   = max[n] S[m,n]
SD[m]   = sum[n] exp(S[m,n] - GM[m])
AV[m,f] = sum[n] exp(S[m,n] - GM[m]) / SD[m] * V[n,f]
""",
}


@pytest.mark.parametrize("name", _MASKED)
def test_masked_rows_as_written(name: str) -> None:
    """Rows with everything, something and nothing unmasked: NaN, zero or the uniform average, as the text says."""
    cascade = parse_cascade(_SCORES + _MASKED[name])
    rewriting = rewrite(cascade)
    generator = np.random.default_rng(fresh_random().getrandbits(64))
    inputs = {name: generator.normal(size=shape) for name, shape in {"Q": (4, 3), "K": (9, 3), "V": (9, 2)}.items()}
    inputs["M"] = np.array([9.0, 4.0, 1.0, 0.0])
    expected, found = evaluate(cascade, inputs), evaluate(rewriting.cascade, inputs)
    np.testing.assert_allclose(found["AV"], expected["AV"], rtol=1e-10)
    assert len(rewriting.certificates) == 2
    (monoid,) = rewriting.monoids
    sizes = rank_sizes(cascade, inputs, {})
    tensors = {**expected, **found}
    # Blocks of which some are masked altogether.
    states = [block_state(monoid, tensors, sizes, block) for block in np.split(np.arange(9), [1, 3, 6, 7])]
    while len(states) > 1:
        states[-2:] = [merge_states(monoid, states[-2], states[-1], tensors, sizes)]
    np.testing.assert_allclose(results(monoid, states[0], tensors, sizes)["AV"], expected["AV"], rtol=1e-10)


def test_a_mask_that_hides_large_scores_does_not_underflow() -> None:
    """The running maximum is that of the unmasked scores: a masked score of 5000 must not push the others to 0."""
    cascade = parse_cascade(_MASKED["after the exponential"].replace("QK[m,n]", "X[n]"))
    rewriting = rewrite(cascade)
    inputs = {"X": np.array([1.0, 2.0, 5000.0]), "M": np.array([2.0]), "V": np.array([[1.0], [3.0], [7.0]])}
    found = evaluate(rewriting.cascade, inputs)["AV"]
    weights = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    np.testing.assert_allclose(found, [[weights @ [1.0, 3.0]]], rtol=1e-12)


def test_scores_that_would_overflow() -> None:
    cascade = parse_cascade(KNOWN["stable softmax attention"].text)
    generator = np.random.default_rng(fresh_random().getrandbits(64))
    inputs = {name: generator.normal(size=shape) for name, shape in {"Q": (4, 3), "K": (9, 3), "V": (9, 2)}.items()}
    inputs["K"] *= 1e4
    expected = evaluate(cascade, inputs)["AV"]
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(evaluate(rewrite(cascade).cascade, inputs)["AV"], expected, rtol=1e-9)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_special_scores_give_the_same_pattern(special: float) -> None:
    cascade = parse_cascade(KNOWN["maximum of a softmax"].text.replace("max[n] exp", "sum[n] Y[n] * exp"))
    generator = np.random.default_rng(fresh_random().getrandbits(64))
    inputs = {"X": generator.normal(size=7), "Y": generator.normal(size=7)}
    inputs["X"][generator.integers(7)] = special
    expected, found = evaluate(cascade, inputs)["PM"], evaluate(rewrite(cascade).cascade, inputs)["PM"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_empty_fibers() -> None:
    cascade = parse_cascade(KNOWN["product of a product"].text)
    inputs = {"A": np.zeros(0), "B": np.zeros(0)}
    assert evaluate(cascade, inputs)["Z"] == evaluate(rewrite(cascade).cascade, inputs)["Z"] == 0


# Separable rank ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("summed", "k"),
    [
        ("X[n] * M[]", 1),
        ("exp(X[n] - M[])", 1),
        ("exp(X[n] + Y[n] - M[]) * Y[n]", 1),
        ("(X[n] - M[])**2", 3),
        ("(X[n] - M[])**5", 6),
        ("X[n]**2 - 2*X[n]*M[] + M[]**2", 3),
        ("(X[n] - M[]) * (Y[n] - M[])", 3),
        ("(X[n] - M[]) * (X[n] + M[])", 2),
        ("exp(X[n] - M[]) * (X[n] - M[])", 2),
        ("where(n < 3, X[n], M[])", 2),
        ("abs(X[n] * M[])", 1),
        ("2**(X[n] + M[])", 1),
        ("log((1 + X[n]**2) * (1 + M[]**2))", 2),
        ("sqrt((1 + X[n]**2) / (1 + M[]**2))", 1),
        ("relu(X[n] * (1 + M[]**2))", 1),
    ],
)
def test_smallest_rank(summed: str, k: int) -> None:
    """k is the numerical rank of the sampled summand, found another way: singular values."""
    cascade = parse_cascade(f"M[] = sum[n] X[n]\nR[] = sum[n] {summed}\n")
    found = rank_passes(cascade, group_of(cascade, rank("n")))
    parts = summand(cascade, cascade.definitions["R"], 1, found, tensor_intervals(cascade))
    pairs = separate(decompose(parts.f, parts.variables))
    assert len(pairs) == k
    generator = np.random.default_rng(fresh_random().getrandbits(64))
    values = {symbol: generator.uniform(0.2, 2, (12, 1)) for symbol in parts.f.free_symbols}
    values.update({symbol: np.arange(12.0)[:, None] for symbol in values if symbol == rank("n")})
    values.update({symbol: generator.uniform(0.2, 2, (1, 12)) for symbol in parts.variables.d})
    matrix = np.broadcast_to(evaluate_expression(parts.f, values), (12, 12))
    assert np.linalg.matrix_rank(matrix, tol=1e-9) == k
