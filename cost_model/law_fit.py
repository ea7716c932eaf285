"""Coefficients of a sum of parts that explain measured seconds."""

from __future__ import annotations

from collections.abc import Sequence


def nonnegative_fit(parts: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Coefficients, none below zero, of least squares on relative errors: those that come out negative are left out
    one by one. ``parts``: a row for each measurement, in ``seconds``."""
    import numpy as np

    matrix = np.array(parts, dtype=float) / np.array(seconds)[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        scale = np.abs(matrix[:, used]).max(axis=0)
        solved = np.linalg.lstsq(matrix[:, used] / scale, np.ones(len(matrix)), rcond=None)[0] / scale
        if (solved >= 0).all() or len(used) == 1:
            break
        used.pop(int(np.argmin(solved * scale)))
    found = [0.0] * matrix.shape[1]
    for index, value in zip(used, solved, strict=True):
        found[index] = max(0.0, float(value))
    return tuple(found)
