"""Attention written out as cascades, in the variants that models use, and their gradients.

Ranks: batch b, heads h, queries m, keys n, features d (of scores) and f (of values).
"""

from __future__ import annotations

_AXES = "b,h"


def _scores(score: str, keys: str = "K[b,h,n,d]") -> str:
    return f"QK[b,h,m,n] = sum[d] Q[b,h,m,d] * {keys}\nS[b,h,m,n] = {score}\n"


def forward(score: str, keys: str = "K[b,h,n,d]", values: str = "V[b,h,n,f]") -> str:
    """A stable softmax over scores ``S`` made of ``QK[b,h,m,n]``, times V."""
    return (
        _scores(score, keys)
        + f"""GM[b,h,m]   = max[n] S[b,h,m,n]
SN[b,h,m,n] = exp(S[b,h,m,n] - GM[b,h,m])
SD[b,h,m]   = sum[n] SN[b,h,m,n]
A[b,h,m,n]  = SN[b,h,m,n] / SD[b,h,m]
O[b,h,m,f]  = sum[n] A[b,h,m,n] * {values}
"""
    )


_SCALED = "QK[b,h,m,n] * 0.125"
_DOCUMENTS = f"{_SCALED} + where((n <= m) * (DOC[b,m] == DOC[b,n]), 0, -3.4028234663852886e38)"
_WINDOW = f"where((n <= m) * (m - n < W), {_SCALED}, -inf)"

#: Variant -> the cascade. ``W`` is a window's length, ``P`` a prefix's.
FORWARD: dict[str, str] = {
    "vanilla": forward(_SCALED),
    "causal": forward(f"where(n <= m, {_SCALED}, -inf)"),
    "causal, mask of a mask": forward(f"where(where(n <= m, 1, 0) == 0, -inf, {_SCALED})"),
    "causal, finite mask": forward(f"where(n <= m, {_SCALED}, -1e9)"),
    "alibi": forward(f"where(n <= m, {_SCALED} + SLOPE[h] * (n - m), -inf)"),
    "softcap": forward(f"20 * tanh({_SCALED} / 20)"),
    "window": forward(_WINDOW),
    "prefix": forward(f"where(max(n <= m, n < P), {_SCALED}, -inf)"),
    "documents": forward(f"where((n <= m) * (DOC[b,m] == DOC[b,n]), {_SCALED}, -inf)"),
    "additive mask": forward(f"{_SCALED} + MASK[b,m,n]"),
    "boolean mask": forward(f"where(MASK[b,m,n], {_SCALED}, -inf)"),
    "left padding": forward(f"where((n <= m) * (n >= START[b]), {_SCALED}, -inf)"),
    "left padding, finite": forward(f"where((n <= m) * (n >= START[b]), {_SCALED}, -1267650600228229401496703205376)"),
    "documents, finite": forward(_DOCUMENTS),
    "positions": forward(f"where(KEYS[b,n] <= QUERIES[b,m], {_SCALED}, -inf)"),
    "positions, finite": forward(f"where((KEYS[b,n] <= QUERIES[b,m]) * (m - n < W), {_SCALED}, -1e9)"),
    "relative bias": forward(f"{_SCALED} + BIAS[h,m,n]"),
    "sigmoid": _scores(_SCALED) + "O[b,h,m,f] = sum[n] sigmoid(S[b,h,m,n]) * V[b,h,n,f]\n",
    "sink": _scores(_SCALED)
    + """GM[b,h,m] = max[n] S[b,h,m,n]
GS[b,h,m] = max(GM[b,h,m], SINK[h])
SD[b,h,m] = sum[n] exp(S[b,h,m,n] - GS[b,h,m])
ST[b,h,m] = SD[b,h,m] + exp(SINK[h] - GS[b,h,m])
O[b,h,m,f] = sum[n] exp(S[b,h,m,n] - GS[b,h,m]) / ST[b,h,m] * V[b,h,n,f]
""",
}

#: Query heads h*R + r share the keys of head h.
GROUPED = """
QK[b,h,r,m,n] = sum[d] Q[b,h*R+r,m,d] * K[b,h,n,d]
S[b,h,r,m,n]  = where(n <= m, QK[b,h,r,m,n] * 0.125, -inf)
GM[b,h,r,m]   = max[n] S[b,h,r,m,n]
SD[b,h,r,m]   = sum[n] exp(S[b,h,r,m,n] - GM[b,h,r,m])
O[b,h,r,m,f]  = sum[n] exp(S[b,h,r,m,n] - GM[b,h,r,m]) / SD[b,h,r,m] * V[b,h,n,f]
"""


def backward(score: str, slope: str = "0.125") -> str:
    """Gradients of Q, K and V. ``score`` is S as in ``forward``; ``slope`` is dS/dQK. L (logsumexp) and D (the sum of
    dO*O) are given."""
    return (
        _scores(score)
        + f"""P[b,h,m,n]  = exp(S[b,h,m,n] - L[b,h,m])
DP[b,h,m,n] = sum[f] DO[b,h,m,f] * V[b,h,n,f]
DS[b,h,m,n] = P[b,h,m,n] * (DP[b,h,m,n] - D[b,h,m]) * {slope}
DQ[b,h,m,d] = sum[n] DS[b,h,m,n] * K[b,h,n,d]
DK[b,h,n,d] = sum[m] DS[b,h,m,n] * Q[b,h,m,d]
DV[b,h,n,f] = sum[m] P[b,h,m,n] * DO[b,h,m,f]
"""
    )


BACKWARD: dict[str, str] = {
    "vanilla": backward(_SCALED),
    "causal": backward(f"where(n <= m, {_SCALED}, -inf)"),
    "alibi": backward(f"where(n <= m, {_SCALED} + SLOPE[h] * (n - m), -inf)"),
    "softcap": backward(f"20 * tanh({_SCALED} / 20)", "0.125 * (1 - tanh(QK[b,h,m,n] / 160)**2)"),
    "window": backward(_WINDOW),
    "documents, finite": backward(_DOCUMENTS),
    "left padding, finite": backward(f"where((n <= m) * (n >= START[b]), {_SCALED}, -1267650600228229401496703205376)"),
    "positions, finite": backward(f"where(KEYS[b,n] <= QUERIES[b,m], {_SCALED}, -1e9)"),
}
