"""Rewritten cascades: known counts, certificates checked by others' means, refusals, and the same values."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

import numpy as np
import pytest
import sympy
from effcc.ir.cascade import Cascade, tensor_name
from effcc.ir.cascade_interpreter import Array, evaluate, rank_sizes
from effcc.ir.cascade_parser import parse_cascade
from effcc.ir.cascade_printer import print_cascade
from effcc.ir.monoid import Monoid
from effcc.ir.monoid_interpreter import block_state, merge_states, results
from effcc.passes.cascade_analysis import pass_table
from effcc.passes.certificate import Certificate
from effcc.passes.rewrite_cascade import Rewriting, rewrite
from fresh_seed import fresh_random
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from known_cascades import KNOWN, REFUSED
from random_cascades import SIZES, random_cascade, random_inputs

_EXTENTS = {"m": 4, "n": 12, "d": 3, "f": 2, "t": 4, "v": 6, "k": 5, "b": 3, "s": 4, "i": 7, "j": 7}


@pytest.fixture(scope="module")
def rewritings() -> Mapping[str, tuple[Cascade, Rewriting]]:
    """Every known cascade and its rewriting, made once."""
    cascades = {name: parse_cascade(known.text) for name, known in KNOWN.items()}
    return {name: (cascade, rewrite(cascade)) for name, cascade in cascades.items()}


def _inputs(cascade: Cascade, sizes: Mapping[str, int], source: random.Random) -> dict[str, Array]:
    """Standard normal inputs; T (a word's number) is an integer."""
    generator = np.random.default_rng(source.getrandbits(64))
    extents = {**_EXTENTS, **sizes}
    found: dict[str, Array] = {}
    for item in (item for einsum in cascade.einsums for item in einsum.reads):
        name = tensor_name(item)
        if name in cascade.inputs and name not in found:
            shape = [extents[i.name] if i.is_Symbol else extents["c"] * extents["j"] for i in item.args]
            found[name] = generator.normal(size=shape)
            if name == "T":
                found[name] = generator.integers(0, extents["v"], shape).astype(np.float64)
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_known_cascades_after_rewriting(name: str, rewritings: Mapping[str, tuple[Cascade, Rewriting]]) -> None:
    known, (_, rewriting) = KNOWN[name], rewritings[name]
    table = pass_table(rewriting.cascade)
    assert {(t, r): table[t][r] for t, r, _, _ in known.checks} == {(t, r): n for t, r, _, n in known.checks}
    ranks = {certificate.einsum: certificate.k for certificate in rewriting.certificates}
    assert {einsum: ranks.get(einsum) for einsum, _ in known.k} == dict(known.k)


@pytest.mark.parametrize("name", KNOWN)
def test_rewritten_cascades_compute_the_same(name: str, rewritings: Mapping[str, tuple[Cascade, Rewriting]]) -> None:
    """As loops over the rank, and split into random blocks that are merged in a random tree."""
    source = fresh_random()
    (cascade, rewriting), sizes = rewritings[name], dict(KNOWN[name].sizes)
    inputs = _inputs(cascade, sizes, source)
    expected = evaluate(cascade, inputs, sizes)
    found = evaluate(rewriting.cascade, inputs, sizes)
    for output in cascade.outputs:
        np.testing.assert_allclose(found[output], expected[output], rtol=1e-10, atol=1e-12)
    whole = rank_sizes(rewriting.cascade, inputs, {**sizes, **rank_sizes(cascade, inputs, sizes)})
    for monoid in rewriting.monoids:
        _check_split(monoid, {**expected, **found}, whole, expected, source)


def _check_split(
    monoid: Monoid,
    tensors: Mapping[str, Array],
    sizes: Mapping[str, int],
    expected: Mapping[str, Array],
    source: random.Random,
) -> int:
    extent = sizes[monoid.rank.name]
    cuts = sorted(source.sample(range(1, extent), source.randint(1, extent - 1)))
    states = [block_state(monoid, tensors, sizes, block) for block in np.split(np.arange(extent), cuts)]
    while len(states) > 1:
        at = source.randrange(len(states) - 1)
        states[at : at + 2] = [merge_states(monoid, states[at], states[at + 1], tensors, sizes)]
    found = results(monoid, states[0], tensors, sizes)
    scale = max([1.0, *(float(np.abs(expected[name]).max()) for name in found if name in expected)])
    for name in found:
        if name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-9 * scale)
    return len(found)


# Certificates --------------------------------------------------------------------------------------------------------


def _read(text: str) -> sympy.Expr:
    """Sympy's own reading of a certificate's text (the test trusts it; effcc never reads such text back)."""
    names = re.findall(r"\b[A-Za-z_]\w*\b(?!\()", text)
    return sympy.sympify(text, locals={n: sympy.Symbol(n, real=True) for n in names if n not in ("True", "False")})


def _rationals(symbols: set[sympy.Symbol], source: random.Random) -> dict[sympy.Symbol, sympy.Rational]:
    """Exact positive values (logarithms and roots are then real); a size is a whole number."""
    return {
        symbol: sympy.Integer(source.randint(2, 9))
        if symbol.name.startswith("size_") or symbol.name in ("v", "T")
        else sympy.Rational(source.randint(1, 40), source.randint(1, 40))
        for symbol in sorted(symbols, key=lambda s: s.name)
    }


def _check_certificate(certificate: Certificate, source: random.Random) -> None:
    told = certificate.to_json()
    f = _read(certificate.summand_text)
    g, h = ([_read(text) for text in told[key]] for key in ("g", "h"))  # type: ignore[attr-defined]
    assert len(g) == len(h) == told["k"] and told["residual"] == "0"
    residual = f - sum(a * b for a, b in zip(g, h, strict=True))
    if certificate.mode != "exchange" and "monotone" in " ".join(certificate.conditions):
        residual = f - h[0].xreplace({sympy.Symbol("finished", real=True): g[0]})
    for _ in range(3):
        value = residual.xreplace(_rationals(residual.free_symbols, source))
        assert sympy.simplify(sympy.expand_log(value, force=True)) == 0, certificate
    names = {symbol.name for e in g for symbol in e.free_symbols} & set(certificate.depends_on)
    assert not names, f"g reads {names}"
    assert certificate.conditions and all(certificate.conditions.values())
    if told["T"] is None:
        assert certificate.mode in ("defer", "exchange")
        return
    _check_cocycle(sympy.Matrix([[_read(text) for text in row] for row in told["T"]]), source)  # type: ignore[attr-defined]


def _check_cocycle(matrix: sympy.Matrix, source: random.Random) -> None:
    """``T(b, c) T(a, b) = T(a, c)``, and T(a, a) is the identity."""
    references = {s.name.removesuffix("_new") for s in matrix.free_symbols}

    def transition(before: Mapping[str, sympy.Expr], after: Mapping[str, sympy.Expr]) -> sympy.Matrix:
        return matrix.xreplace(
            {sympy.Symbol(name, real=True): before[name] for name in references}
            | {sympy.Symbol(f"{name}_new", real=True): after[name] for name in references}
        )

    a, b, c = (
        {name: sympy.Rational(source.randint(-30, 30), source.randint(1, 9)) for name in references} for _ in range(3)
    )
    difference = transition(b, c) * transition(a, b) - transition(a, c)
    assert difference.applyfunc(sympy.simplify) == sympy.zeros(*matrix.shape)
    assert transition(a, a).applyfunc(sympy.simplify) == sympy.eye(matrix.rows)


@pytest.mark.parametrize("name", KNOWN)
def test_certificates_hold_for_exact_numbers(name: str, rewritings: Mapping[str, tuple[Cascade, Rewriting]]) -> None:
    source = fresh_random()
    for certificate in rewritings[name][1].certificates:
        _check_certificate(certificate, source)


def test_variance_is_chans_merge() -> None:
    """Chan, Golub and LeVeque: M2 = M2a + M2b + (mean_a - mean_b)^2 * na * nb / (na + nb), whatever is in the parts."""
    (certificate,) = rewrite(parse_cascade(KNOWN["variance"].text)).certificates
    transition = sympy.Matrix([[_read(text) for text in row] for row in certificate.to_json()["T"]])  # type: ignore[attr-defined]
    na, nb, ma, mb, qa, qb = sympy.symbols("na nb ma mb qa qb", positive=True)
    old, new = sympy.symbols("V_mean V_mean_new", real=True)
    mean = (na * ma + nb * mb) / (na + nb)
    # A part's state relative to its own mean: second moment, first moment (0), count.
    merged = sum(
        (
            transition.xreplace({old: own, new: mean}) * sympy.Matrix([q, 0, n])
            for own, q, n in ((ma, qa, na), (mb, qb, nb))
        ),
        sympy.zeros(3, 1),
    )
    chan = qa + qb + (ma - mb) ** 2 * na * nb / (na + nb)
    assert sympy.simplify(merged[0] - chan) == 0
    assert sympy.simplify(merged[1]) == 0 and sympy.simplify(merged[2] - na - nb) == 0


def test_every_known_rank_is_the_smallest() -> None:
    """The numerical rank of sampled summands, which the proofs do not use, agrees with k."""
    for name in ("covariance", "variance", "entropy", "stable softmax attention", "layernorm, then a dot product"):
        for certificate in rewrite(parse_cascade(KNOWN[name].text)).certificates:
            assert certificate.conditions["rank_minimal"], name


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_truly_multi_pass_cascades_are_refused(name: str) -> None:
    text, tensor, rank, count, einsum, word = REFUSED[name]
    cascade = parse_cascade(text)
    rewriting = rewrite(cascade)
    assert pass_table(cascade)[tensor][rank] == pass_table(rewriting.cascade)[tensor][rank] == count
    assert rewriting.certificates == ()
    assert print_cascade(rewriting.cascade) == print_cascade(cascade)
    reasons = [refusal.why for refusal in rewriting.refusals if refusal.einsum == einsum]
    assert reasons and all(word in why for why in reasons), reasons


def test_what_depends_on_something_refused_still_moves_as_far_as_it_can() -> None:
    """Sigmoid weights relative to a maximum need two passes, but their normalization does not need a third."""
    text = """
M[]  = max[n] X[n]
S[]  = sum[n] sigmoid(X[n] - M[])
Y[]  = sum[n] sigmoid(X[n] - M[]) / S[] * V[n]
"""
    cascade = parse_cascade(text)
    rewriting = rewrite(cascade)
    assert (pass_table(cascade)["X"]["n"], pass_table(rewriting.cascade)["X"]["n"]) == (3, 2)
    assert {refusal.einsum for refusal in rewriting.refusals} == {"S", "Y"}
    inputs = _inputs(cascade, {}, fresh_random())
    np.testing.assert_allclose(evaluate(rewriting.cascade, inputs)["Y"], evaluate(cascade, inputs)["Y"], rtol=1e-12)


def test_no_input_is_visited_more_often_than_before() -> None:
    """U needs A, and Y is read again for it anyway: moving B to the first pass would make Y's one pass two."""
    text = "A[] = sum[n] X[n]\nB[] = sum[n] Y[n] * A[]\nU[n] = Y[n] * A[]\n"
    rewriting = rewrite(parse_cascade(text))
    assert pass_table(rewriting.cascade)["Y"]["n"] == 1
    assert rewriting.certificates == ()


# Contraction exchange ------------------------------------------------------------------------------------------------


def test_delta_is_derived_by_exchanging_contractions() -> None:
    rewriting = rewrite(parse_cascade(KNOWN["attention and dQ"].text))
    assert "D[m] = sum[f] DO[m,f]*O[m,f]\n" in print_cascade(rewriting.cascade)
    (certificate,) = (each for each in rewriting.certificates if each.mode == "exchange")
    assert (certificate.einsum, certificate.depends_on) == ("D", ("O",))


_FORWARD = """
QK[m,n] = sum[d] Q[m,d] * K[n,d]
GM[m]   = max[n] QK[m,n]
SD[m]   = sum[n] exp(QK[m,n] - GM[m])
"""


def test_exchange_finds_the_output_under_other_names_and_factors() -> None:
    """The forward divides after its sum and calls its ranks i, j; the backward writes the probabilities out again."""
    text = """
QK[i,j] = sum[d] Q[i,d] * K[j,d]
GM[i]   = max[j] QK[i,j]
SN[i,j] = exp(QK[i,j] - GM[i])
SD[i]   = sum[j] SN[i,j]
SV[i,f] = sum[j] SN[i,j] * V[j,f]
O[i,f]  = SV[i,f] / SD[i]
P[m,n]  = exp(QK[m,n] - GM[m]) / SD[m]
DP[m,n] = sum[e] DO[m,e] * V[n,e]
D[m]    = sum[n] P[m,n] * DP[m,n]
DQ[m,d] = sum[n] P[m,n] * (DP[m,n] - D[m]) * K[n,d]
"""
    cascade = parse_cascade(text)
    rewriting = rewrite(cascade)
    assert "D[m] = sum[e] DO[m,e]*SV[m,e]/SD[m]\n" in print_cascade(rewriting.cascade)
    assert pass_table(rewriting.cascade)["K"]["n"] == 1
    inputs = _inputs(cascade, {"i": 4, "j": 12, "e": 2}, fresh_random())
    expected, found = evaluate(cascade, inputs), evaluate(rewriting.cascade, inputs)
    for output in cascade.outputs:
        np.testing.assert_allclose(found[output], expected[output], rtol=1e-10, atol=1e-12)


def test_another_consumer_of_the_probabilities() -> None:
    """Returned weights have a gradient G: D gains the sum of P*G. It is streamed then, still in one pass."""
    text = (
        _FORWARD
        + """
P[m,n]  = exp(QK[m,n] - GM[m]) / SD[m]
O[m,f]  = sum[n] P[m,n] * V[n,f]
DV[m,n] = sum[f] DO[m,f] * V[n,f]
DP[m,n] = DV[m,n] + G[m,n]
D[m]    = sum[n] P[m,n] * DP[m,n]
DQ[m,d] = sum[n] P[m,n] * (DP[m,n] - D[m]) * K[n,d]
"""
    )
    cascade = parse_cascade(text)
    rewriting = rewrite(cascade)
    assert all(certificate.mode == "rebase" for certificate in rewriting.certificates)
    assert {pass_table(rewriting.cascade)[tensor]["n"] for tensor in ("K", "G")} == {1}
    inputs = _inputs(cascade, {}, fresh_random())
    expected, found = evaluate(cascade, inputs), evaluate(rewriting.cascade, inputs)
    np.testing.assert_allclose(found["DQ"], expected["DQ"], rtol=1e-10, atol=1e-12)


def test_nothing_is_exchanged_where_the_other_order_is_not_known() -> None:
    """O sums other values, so the contraction over n is needed; it is streamed instead."""
    text = _FORWARD + "P[m,n] = exp(QK[m,n] - GM[m]) / SD[m]\nO[m,f] = sum[n] P[m,n] * U[n,f]\n"
    text += "DP[m,n] = sum[f] DO[m,f] * V[n,f]\nD[m] = sum[n] P[m,n] * DP[m,n]\n"
    rewriting = rewrite(parse_cascade(text))
    assert {certificate.mode for certificate in rewriting.certificates} == {"rebase"}
    assert pass_table(rewriting.cascade)["K"]["n"] == 1


def test_what_is_exchanged_already_stays() -> None:
    text = _FORWARD + "P[m,n] = exp(QK[m,n] - GM[m]) / SD[m]\nO[m,f] = sum[n] P[m,n] * V[n,f]\n"
    text += "DP[m,n] = sum[f] DO[m,f] * V[n,f]\nD[m] = sum[f] DO[m,f] * O[m,f]\n"
    text += "DQ[m,d] = sum[n] P[m,n] * (DP[m,n] - D[m]) * K[n,d]\n"
    rewriting = rewrite(parse_cascade(text))
    assert all(certificate.mode != "exchange" for certificate in rewriting.certificates)
    assert "D[m] = sum[f] DO[m,f]*O[m,f]\n" in print_cascade(rewriting.cascade)


# Random cascades -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1))
def test_random_cascades(seed: int) -> None:
    """The same values as loops and split into blocks, never more passes over an input, and text that reads back."""
    cascade = random_cascade(seed)
    rewriting = rewrite(cascade)
    before, after = pass_table(cascade), pass_table(rewriting.cascade)
    for name in set(cascade.inputs) & set(after):
        assert all(after[name][rank] <= before[name][rank] for rank in after[name]), name
    assert parse_cascade(print_cascade(rewriting.cascade)) == rewriting.cascade
    inputs = random_inputs(cascade, seed)
    expected, found = evaluate(cascade, inputs, SIZES), evaluate(rewriting.cascade, inputs, SIZES)
    if not all(np.isfinite(value).all() for value in expected.values()):
        return
    scale = max([1.0, *(float(np.abs(value).max()) for value in expected.values())])
    for output in cascade.outputs:
        np.testing.assert_allclose(found[output], expected[output], rtol=1e-9, atol=1e-9 * scale)
    for monoid in rewriting.monoids:
        assert _check_split(monoid, {**expected, **found}, SIZES, expected, random.Random(seed))
