"""The functions that every generated Triton module starts with."""

PRELUDE = """
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def multiplied(a, b):
    return a * b


@triton.jit
def highest(x, axis: tl.constexpr):
    if INTERPRETED:  # it has no NaN in its maximum, and is slow with functions of ours
        return tl.max(x, axis) + tl.sum(tl.where(x != x, float("nan"), 0.0), axis)
    else:
        return tl.reduce(x, axis, maximum)


@triton.jit
def lowest(x, axis: tl.constexpr):
    if INTERPRETED:
        return tl.min(x, axis) + tl.sum(tl.where(x != x, float("nan"), 0.0), axis)
    else:
        return tl.reduce(x, axis, minimum)


@triton.jit
def product(x, axis: tl.constexpr):
    return tl.reduce(x, axis, multiplied)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def hyperbolic_tangent(x):
    # (1 - t) / (1 + t), t = exp(-2|x|); near 0, where 1 - t loses digits, the first terms of the series.
    a = tl.abs(x)
    t = tl.exp2(a * -2.8853900817779268)
    far = (1.0 - t) / (1.0 + t)
    y = x * x
    near = a * (1.0 + y * (-0.33333333333333333 + y * (0.13333333333333333 + y * -0.05396825396825397)))
    limit: tl.constexpr = 0.15 if x.dtype == tl.float32 else 0.001
    found = tl.where(a < limit, near, far)
    return tl.where(x < 0, -found, found)


@triton.jit
def rounded(x):
    # Adding and taking away 1.5 * 2**23 (2**52 in double precision) rounds to even.
    big: tl.constexpr = 12582912.0 if x.dtype == tl.float32 else 6755399441055744.0
    return tl.where(tl.abs(x) < big / 3, (x + big) - big, x)


@triton.jit
def power(x, y):
    # As torch: a negative base has a power only where the exponent is whole.
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    negative = tl.where(rounded(y * 0.5) * 2.0 == y, size, -size)
    negative = tl.where(rounded(y) == y, negative, float("nan"))
    found = tl.where(x < 0, negative, size)
    return tl.where(y == 0, 1.0, found)
"""
