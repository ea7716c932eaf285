"""Cascades whose passes are known: (tensor, rank, as written, after rewriting); and some that are truly multi-pass.

The counts of attention's variants are FuseMax's (MICRO'24); the others follow from its definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "cascades"


@dataclass(frozen=True)
class Known:
    """``checks``: (tensor, rank, passes as written, passes after rewriting). ``k``: Einsum -> its separable rank."""

    text: str
    checks: tuple[tuple[str, str, int, int], ...]
    k: tuple[tuple[str, int], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()


def _example(name: str) -> str:
    return (EXAMPLES / f"{name}.cascade").read_text()


_SCORES = "QK[m,n] = sum[d] Q[m,d] * K[n,d]\n"
_CHUNKS = (("c", 3), ("j", 4), ("B", 4))

KNOWN: dict[str, Known] = {
    "product of a product": Known(
        "Y[] = sum[k] A[k] * B[k]\nZ[] = sum[k] Y[] * A[k]\n", (("A", "k", 2, 1), ("B", "k", 1, 1)), (("Z", 1),)
    ),
    "stable softmax attention": Known(
        _example("attention"),
        (("K", "n", 3, 1), ("QK", "n", 3, 1), ("V", "n", 1, 1)),
        (("SD", 1), ("AV", 1)),
    ),
    "attention with deferred division": Known(
        _SCORES
        + """
GM[m]   = max[n] QK[m,n]
SN[m,n] = exp(QK[m,n] - GM[m])
SD[m]   = sum[n] SN[m,n]
SV[m,f] = sum[n] SN[m,n] * V[n,f]
AV[m,f] = SV[m,f] / SD[m]
""",
        (("K", "n", 2, 1), ("QK", "n", 2, 1)),
        (("SD", 1), ("SV", 1)),
    ),
    "FlashAttention-2": Known(
        _example("flash_attention_2"), (("K", "c", 1, 1), ("QK", "c", 1, 1), ("V", "c", 1, 1)), (), _CHUNKS
    ),
    "online softmax, one key a step": Known(
        _SCORES
        + """
RM[m,0]     = -inf
RM[m,n+1]   = max(RM[m,n], QK[m,n])
RD[m,0]     = 0
RD[m,n+1]   = RD[m,n] * exp(RM[m,n] - RM[m,n+1]) + exp(QK[m,n] - RM[m,n+1])
RV[m,f,0]   = 0
RV[m,f,n+1] = RV[m,f,n] * exp(RM[m,n] - RM[m,n+1]) + exp(QK[m,n] - RM[m,n+1]) * V[n,f]
AV[m,f]     = RV[m,f,|n|] / RD[m,|n|]
""",
        (("K", "n", 1, 1), ("QK", "n", 1, 1), ("V", "n", 1, 1)),
    ),
    "softmax without maximum": Known(
        _SCORES
        + """
SN[m,n] = exp(QK[m,n])
SD[m]   = sum[n] SN[m,n]
A[m,n]  = SN[m,n] / SD[m]
AV[m,f] = sum[n] A[m,n] * V[n,f]
""",
        (("K", "n", 2, 1), ("QK", "n", 2, 1)),
        (("AV", 1),),
    ),
    "layernorm, then a dot product": Known(
        _example("layernorm_dot"), (("X", "d", 3, 1), ("W", "d", 1, 1)), (("VR", 3), ("Y", 2))
    ),
    "RMSNorm, then a dot product": Known(
        """
MS[m]  = sum[d] X[m,d]**2 / |d|
Y[m,f] = sum[d] X[m,d] * rsqrt(MS[m] + 1e-6) * G[d] * W[d,f]
""",
        (("X", "d", 2, 1),),
        (("Y", 1),),
    ),
    "linear and cross-entropy": Known(
        """
Z[t,v] = sum[d] H[t,d] * W[v,d]
MX[t]  = max[v] Z[t,v]
SE[t]  = sum[v] exp(Z[t,v] - MX[t])
LL[t]  = sum[v] where(v == T[t], Z[t,v] - MX[t] - log(SE[t]), 0)
LOSS[] = sum[t] -LL[t] / |t|
""",
        (("W", "v", 3, 1), ("Z", "v", 3, 1)),
        (("SE", 1), ("LL", 2)),
    ),
    "linear, cross-entropy and the gradient of its input": Known(
        _example("cross_entropy"), (("W", "v", 3, 1), ("Z", "v", 3, 1)), (("SE", 1), ("DH", 2))
    ),
    "gradients of linear and cross-entropy, L saved": Known(
        """
Z[t,v]  = sum[d] H[t,d] * W[v,d]
DZ[t,v] = (exp(Z[t,v] - L[t]) - where(v == T[t], 1, 0)) * G[] / |t|
DH[t,d] = sum[v] DZ[t,v] * W[v,d]
DW[v,d] = sum[t] DZ[t,v] * H[t,d]
""",
        (("W", "v", 1, 1), ("H", "t", 1, 1)),
    ),
    "Rabe and Staats": Known(
        _example("chunked_attention"),
        (("K", "c", 3, 1), ("K", "j", 2, 1), ("V", "c", 2, 1)),
        (("SD", 1), ("AV", 1), ("LD", 1), ("LV", 1)),
        _CHUNKS,
    ),
    "variance": Known(
        "M[] = sum[n] X[n] / |n|\nV[] = sum[n] (X[n] - M[])**2 / |n|\n", (("X", "n", 2, 1),), (("V", 3),)
    ),
    "entropy": Known(
        """
MX[] = max[n] X[n]
S[]  = sum[n] exp(X[n] - MX[])
P[n] = exp(X[n] - MX[]) / S[]
H[]  = sum[n] -P[n] * log(P[n])
""",
        (("X", "n", 3, 1),),
        (("S", 1), ("H", 2)),
    ),
    "KL divergence": Known(
        """
MX[] = max[n] X[n]
SX[] = sum[n] exp(X[n] - MX[])
MY[] = max[n] Y[n]
SY[] = sum[n] exp(Y[n] - MY[])
LP[n] = X[n] - MX[] - log(SX[])
LQ[n] = Y[n] - MY[] - log(SY[])
KL[] = sum[n] exp(LP[n]) * (LP[n] - LQ[n])
""",
        (("X", "n", 3, 1), ("Y", "n", 3, 1)),
        (("KL", 2),),
    ),
    "covariance": Known(_example("covariance"), (("X", "n", 2, 1), ("Y", "n", 2, 1)), (("CV", 4),)),
    "attention and dQ": Known(
        _example("attention_backward"),
        (("K", "n", 4, 1), ("V", "n", 3, 1)),
        (("SD", 1), ("O", 1), ("DQ", 2)),
    ),
    "attention's dQ, L saved": Known(
        _SCORES
        + """
P[m,n]  = exp(QK[m,n] - L[m])
DP[m,n] = sum[f] DO[m,f] * V[n,f]
D[m]    = sum[n] P[m,n] * DP[m,n]
DQ[m,d] = sum[n] P[m,n] * (DP[m,n] - D[m]) * K[n,d]
""",
        (("K", "n", 2, 1), ("V", "n", 2, 1)),
        (("DQ", 2),),
    ),
    "attention's dK and dV, L and D saved": Known(
        _SCORES
        + """
P[m,n]  = exp(QK[m,n] - L[m])
DP[m,n] = sum[f] DO[m,f] * V[n,f]
DS[m,n] = P[m,n] * (DP[m,n] - D[m])
DK[n,d] = sum[m] DS[m,n] * Q[m,d]
DV[n,f] = sum[m] P[m,n] * DO[m,f]
""",
        (("Q", "m", 1, 1), ("DO", "m", 1, 1)),
    ),
    "softcap": Known(
        _SCORES
        + """
S[m,n]  = 30 * tanh(QK[m,n] / 30)
GM[m]   = max[n] S[m,n]
SD[m]   = sum[n] exp(S[m,n] - GM[m])
AV[m,f] = sum[n] exp(S[m,n] - GM[m]) / SD[m] * V[n,f]
""",
        (("K", "n", 3, 1),),
        (("SD", 1), ("AV", 1)),
    ),
    "maximum of a softmax": Known(
        """
M[]  = max[n] X[n]
S[]  = sum[n] exp(X[n] - M[])
PM[] = max[n] exp(X[n] - M[]) / S[]
""",
        (("X", "n", 3, 1),),
        (("PM", 1),),
    ),
    "powers of 2, ALiBi and a window": Known(
        _SCORES
        + """
S[m,n]  = where((n <= m) * (m - n < 3), QK[m,n] / 8 - SLOPE[] * (m - n), -inf)
GM[m]   = max[n] S[m,n]
SN[m,n] = 2**((S[m,n] - GM[m]) * 1.4426950408889634)
SD[m]   = sum[n] SN[m,n]
AV[m,f] = sum[n] SN[m,n] / SD[m] * V[n,f]
""",
        (("K", "n", 3, 1),),
        (("SD", 1), ("AV", 1)),
    ),
    "a softmax that is kept": Known(
        "M[] = max[n] X[n]\nS[] = sum[n] exp(X[n] - M[])\nP[n] = exp(X[n] - M[]) / S[]\n",
        (("X", "n", 3, 2),),
        (("S", 1),),
    ),
    "attention with a sink": Known(
        _SCORES
        + """
GM[m]   = max[n] QK[m,n]
GS[m]   = max(GM[m], SINK[])
SD[m]   = sum[n] exp(QK[m,n] - GS[m])
ST[m]   = SD[m] + exp(SINK[] - GS[m])
AV[m,f] = sum[n] exp(QK[m,n] - GS[m]) / ST[m] * V[n,f]
""",
        (("K", "n", 3, 1),),
        (("AV", 1),),
    ),
    "statistics over two ranks at once": Known(
        """
MU[d] = sum[b,s] X[b,s,d] / (|b| * |s|)
VR[d] = sum[b,s] (X[b,s,d] - MU[d])**2 / (|b| * |s|)
Y[d]  = sum[b,s] (X[b,s,d] - MU[d]) * rsqrt(VR[d] + 1e-5) * W[b,s,d]
""",
        (("X", "b", 3, 1), ("X", "s", 3, 1)),
    ),
    "fourth moment": Known(
        "M[] = sum[n] X[n] / |n|\nK4[] = sum[n] (X[n] - M[])**4\n", (("X", "n", 2, 1),), (("K4", 5),)
    ),
    "the same fiber under two names": Known(
        "M[] = sum[i] X[i] / |i|\nV[] = sum[j] (X[j] - M[])**2\n", (("X", "i", 2, 1), ("X", "j", 2, 1)), (("V", 3),)
    ),
}

#: Truly multi-pass: (text, tensor, rank, passes before and after, the Einsum that is refused, a word of the reason).
REFUSED: dict[str, tuple[str, str, str, int, str, str]] = {
    "sigmoid of x - max": ("M[] = max[n] X[n]\nS[] = sum[n] sigmoid(X[n] - M[])\n", "X", "n", 2, "S", "sigmoid"),
    "relu of x - mean": ("M[] = sum[n] X[n] / |n|\nS[] = sum[n] relu(X[n] - M[])\n", "X", "n", 2, "S", "relu"),
    "abs of x - mean": ("M[] = sum[n] X[n] / |n|\nS[] = sum[n] abs(X[n] - M[])\n", "X", "n", 2, "S", "abs"),
    "rounded quantization": (_example("rounded_quantization"), "X", "k", 2, "Y", "round"),
    "count above the mean": (
        "M[] = sum[n] X[n] / |n|\nC[] = sum[n] where(X[n] > M[], 1, 0)\n",
        "X",
        "n",
        2,
        "C",
        "where",
    ),
    "clipping at the mean": ("M[] = sum[n] X[n]/|n|\nS[] = sum[n] min(X[n], M[])\n", "X", "n", 2, "S", "minimum"),
    "softplus of x - max": (
        "M[] = max[n] X[n]\nS[] = sum[n] log(1 + exp(X[n] - M[]))\n",
        "X",
        "n",
        2,
        "S",
        "log",
    ),
    "distance to a centre in the plane": (
        "M[] = sum[n] X[n] / |n|\nS[] = sum[n] sqrt(1 + (X[n] - M[])**2)\n",
        "X",
        "n",
        2,
        "S",
        "power 1/2",
    ),
    "tanh of x - mean": ("M[] = sum[n] X[n] / |n|\nS[] = sum[n] tanh(X[n] - M[])\n", "X", "n", 2, "S", "tanh"),
    "a power that the data sets": (
        "M[] = max[n] X[n]\nS[] = sum[n] abs(X[n])**M[]\n",
        "X",
        "n",
        2,
        "S",
        "power",
    ),
    "standardized values kept": (
        "M[] = sum[n] X[n] / |n|\nY[n] = X[n] - M[]\n",
        "X",
        "n",
        2,
        "Y",
        "visited again",
    ),
    "product of deviations": ("M[] = sum[n] X[n]\nP[] = prod[n] (X[n] - M[])\n", "X", "n", 2, "P", "product"),
}
