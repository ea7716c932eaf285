"""Few-shot adaptation: a handful of measured rows of a device corrects its predictions.

The log of measured over predicted time is a Gaussian process: an offset of the device, one of each family on it, and a
smooth deviation over the family's features, beside noise. Its scales are learned from devices left out of training, so
ten rows move a prediction as far as ten rows of a left-out device are worth. (The setting is HELP's: Lee et al.,
Hardware-adaptive efficient latency prediction, NeurIPS 2021.)
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Points:
    """Rows of any families as the process sees them: family numbers, and features in their deviations (padded with
    zeros to one width)."""

    family: npt.NDArray[np.int64]
    features: Array

    def take(self, which: npt.NDArray[np.int64]) -> Points:
        return Points(self.family[which], self.features[which])


def posterior(scales: Scales, seen: Points, residual: Array, asked: Points) -> tuple[Array, Array]:
    """Mean and standard deviation of log(measured / predicted) at the ``asked`` rows, given it at the ``seen`` ones."""
    if len(residual) > MOST_ROWS:
        kept = np.linspace(0, len(residual) - 1, MOST_ROWS).astype(np.int64)
        seen, residual = seen.take(kept), residual[kept]
    covariance = _covariance(scales, seen, seen) + np.eye(len(residual)) * scales.noise**2
    # a measurement that went wrong must not drag the rest: weigh down what lies far out, once
    first = np.linalg.solve(covariance, residual)
    left = residual - _covariance(scales, seen, seen) @ first
    spread = max(1.4826 * float(np.median(np.abs(left))), scales.noise)
    excess = np.maximum(np.abs(left) / (3 * spread), 1.0)
    covariance = covariance + np.diag(scales.noise**2 * (excess**2 - 1))
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


def _covariance(scales: Scales, one: Points, other: Points) -> Array:
    same = one.family[:, None] == other.family[None, :]
    squares = (one.features**2).sum(axis=1)[:, None] + (other.features**2).sum(axis=1)[None, :]
    apart = np.maximum(squares - 2 * one.features @ other.features.T, 0.0)
    smooth = scales.smooth**2 * np.exp(-0.5 * apart / scales.reach**2)
    return np.asarray(scales.device**2 + same * (scales.family**2 + smooth))
