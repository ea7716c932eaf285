"""Few-shot adaptation: a handful of measured rows of a device corrects its predictions.

The log of measured over predicted time is a Gaussian process: an offset of the device, one of each family on it, and a
smooth deviation over the family's features, beside noise. Its scales are learned from devices left out of training, so
ten rows move a prediction as far as ten rows of a left-out device are worth. Which tiles a device's library uses does
not follow from the device's figures, so the rows also choose among the libraries that are known. (The setting is
HELP's: Lee et al., Hardware-adaptive efficient latency prediction, NeurIPS 2021.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: More measured rows than this add nothing that is worth the cubic time.
MOST_ROWS = 1200


@dataclass(frozen=True)
class Scales:
    """Standard deviations (of log time) of the process's parts, and the reach of the smooth part in deviations of the
    features."""

    device: float = 0.05
    family: float = 0.12
    smooth: float = 0.15
    noise: float = 0.05
    reach: float = 2.0
    #: What the band's half-width must be, in posterior deviations, so that 90 % of left-out rows lie within.
    band: float = 1.64


#: A row this far (log) from the median of all, if that is also much for these rows, is never believed.
_WILD = 1.0
#: Times that noise is raised for rows that lie far out.
_ROBUST_ROUNDS = 3
#: Prior weight of the kernels that the model expects of a device's library, against all others together; and how much
#: of the rows' evidence for others counts, since what the process leaves is alike in rows that are alike.
_EXPECTED = 0.8
_TEMPER = 0.5
#: Alternatives of up to so many rows are weighed together.
_MOST_AT_ONCE = 64
#: Alternatives less likely than this are left out.
_UNLIKELY = 0.02


@dataclass(frozen=True)
class Points:
    """Rows of any families as the process sees them: family numbers, and features in their deviations (padded with
    zeros to one width). Further axes before the rows' are alternatives."""

    family: npt.NDArray[np.int64]
    features: Array

    def take(self, which: npt.NDArray[np.int64]) -> Points:
        return Points(self.family[which], self.features[which])


def posterior(scales: Scales, seen: Points, residual: Array, asked: Points) -> tuple[Array, Array]:
    """Mean and standard deviation of log(measured / predicted) at the ``asked`` rows, given it at the ``seen`` ones."""
    seen, residual = _most(seen, residual)
    covariance = _robust(scales, seen, residual)
    prior = scales.device**2 + scales.family**2 + scales.smooth**2
    mean = np.zeros(len(asked.family))
    variance = np.zeros(len(asked.family))
    factor = np.linalg.cholesky(covariance)
    weight = np.linalg.solve(covariance, residual)
    for begin in range(0, len(mean), 2048):
        part = asked.take(np.arange(begin, min(begin + 2048, len(mean))))
        cross = _covariance(scales, part, seen)
        mean[begin : begin + 2048] = cross @ weight
        explained = np.linalg.solve(factor, cross.T)
        variance[begin : begin + 2048] = prior - (explained**2).sum(axis=0)
    return mean, np.sqrt(np.maximum(variance, 0.0) + scales.noise**2)


def likely(scales: Scales, alternatives: Sequence[tuple[Points, Array]]) -> Array:
    """How likely each of several ways to predict the same measured rows is (points and residuals under each, the
    expected way first), by the evidence of the process for its residuals. Sums to one; zeros for the unlikely."""
    if len(alternatives) == 1:
        return np.ones(1)
    others = (1 - _EXPECTED) / (len(alternatives) - 1)
    found = _TEMPER * _evidences(scales, alternatives)
    found += np.log([_EXPECTED, *[others] * (len(alternatives) - 1)])
    weights = np.exp(found - found.max())
    weights /= weights.sum()
    weights = np.where(weights < _UNLIKELY, 0.0, weights)
    return np.asarray(weights / weights.sum())


def mixed(weights: Array, means: Sequence[Array], deviations: Sequence[Array]) -> tuple[Array, Array]:
    """Mean and standard deviation of a mixture of normals, element by element."""
    mean = sum((weight * each for weight, each in zip(weights, means, strict=True)), np.zeros_like(means[0]))
    variance = np.zeros_like(mean)
    for weight, each, deviation in zip(weights, means, deviations, strict=True):
        variance += weight * (deviation**2 + (each - mean) ** 2)
    return mean, np.sqrt(variance)


def _evidences(scales: Scales, alternatives: Sequence[tuple[Points, Array]]) -> Array:
    """Log density of each alternative's residuals under the process, up to a constant."""
    if len(alternatives[0][1]) > _MOST_AT_ONCE:
        return np.array([float(_evidence(scales, *_most(*each))) for each in alternatives])
    families = np.stack([seen.family for seen, _ in alternatives])
    features = np.stack([seen.features for seen, _ in alternatives])
    return _evidence(scales, Points(families, features), np.stack([residual for _, residual in alternatives]))


def _evidence(scales: Scales, seen: Points, residual: Array) -> Array:
    covariance = _robust(scales, seen, residual)
    half = np.log(np.diagonal(np.linalg.cholesky(covariance), axis1=-2, axis2=-1)).sum(axis=-1)
    return np.asarray(-0.5 * (residual * _solved(covariance, residual)).sum(axis=-1) - half)


def _solved(matrix: Array, right: Array) -> Array:
    return np.asarray(np.linalg.solve(matrix, right[..., None])[..., 0])


def _most(seen: Points, residual: Array) -> tuple[Points, Array]:
    if len(residual) <= MOST_ROWS:
        return seen, residual
    kept = np.linspace(0, len(residual) - 1, MOST_ROWS).astype(np.int64)
    return seen.take(kept), residual[kept]


def _robust(scales: Scales, seen: Points, residual: Array) -> Array:
    """Covariance of the measured rows, of each alternative. A measurement that went wrong must not drag the rest: what
    lies far out from the others has its noise raised until it is no further out than they are."""
    clean = _covariance(scales, seen, seen)
    one = np.eye(residual.shape[-1])
    apart = np.abs(residual - np.median(residual, axis=-1, keepdims=True))
    usual = 5 * 1.4826 * np.median(apart, axis=-1, keepdims=True)
    wild = np.where(apart > np.maximum(usual, _WILD), apart, 0.0) ** 2
    noise = np.maximum(scales.noise**2, wild)
    for _ in range(_ROBUST_ROUNDS):
        explained = (clean @ _solved(clean + noise[..., None] * one, residual)[..., None])[..., 0]
        left = np.abs(residual - explained)
        spread = np.maximum(1.4826 * np.median(left, axis=-1, keepdims=True), scales.noise)
        noise = np.maximum(scales.noise**2 * np.maximum(left / (2.5 * spread), 1.0) ** 2, wild)
    return np.asarray(clean + noise[..., None] * one)


def _covariance(scales: Scales, one: Points, other: Points) -> Array:
    same = one.family[..., :, None] == other.family[..., None, :]
    squares = (one.features**2).sum(axis=-1)[..., :, None] + (other.features**2).sum(axis=-1)[..., None, :]
    apart = np.maximum(squares - 2 * one.features @ np.swapaxes(other.features, -1, -2), 0.0)
    smooth = scales.smooth**2 * np.exp(-0.5 * apart / scales.reach**2)
    return np.asarray(scales.device**2 + same * (scales.family**2 + smooth))
