"""An upper bound on the tokens that equal groups of experts can keep, by semidefinite relaxation.

Let ``v`` be the 0/1 matrix of experts by groups of two consecutive layers (2E x R). ``Z = v v'`` says which pairs of
experts share a group: it is positive semidefinite, its diagonal is 1, its entries lie in [0, 1], and in each of its
four blocks every row adds up to the size of a group, m = E / R. Taking ``1/R`` off every entry leaves R - 1
eigenvalues of 2m and zeros. The tokens kept, ``sum of C * X`` over the blocks X between consecutive layers, are at
most the largest value over matrices Z, one for each pair of layers, that agree on the blocks Y which two pairs share.
Matrices of all pairs that agree so can be completed to one for all layers at once (their pattern is chordal), so
nothing is lost by taking pairs.

It is solved by the alternating direction method of multipliers: entries (clipped to [0, 1]) on one side, spectra
(projected to 0 <= eigenvalue <= 2m with a given sum) on the other. The bound comes from the multipliers alone and holds
for any of them, converged or not: entries are bounded row by row, spectra by the R - 1 largest eigenvalues.

Triangle and star inequalities (triangles.py, stars.py) are added where they are broken, with multipliers of their own.

**Loads.** Of the loads ``L_g`` that a layer's groups have, ``sum of L_g^2 <= max L_g * A`` with A their sum; so the
busiest has at least ``a' Y a / A`` for the experts' loads a. That is linear in Y: with a weight on loads the relaxation
bounds ``tokens kept - weight * busiest``, which no group of one layer can have both ways.

Graph partition as an eigenvalue and semidefinite problem: Donath and Hoffman 1973; Karisch and Rendl 1998. ADMM for
semidefinite programs: Povh, Rendl and Wiegele 2006; Wen, Goldfarb and Yin 2010.
"""

from __future__ import annotations

import time

import numpy as np

from .problem import Floats, Ints
from .stars import Stars
from .triangles import Triangles

#: Rounds between two evaluations of the bound.
_EVERY = 10
#: Share by which the bound is raised for what rounding may have taken off it.
_ROUNDING = 1e-9
#: Rounds before inequalities are looked for, and between two searches; step of the prices of triangles and of stars, in
#: penalties. (Twice as large steps, tried on 64 experts x 24 layers x 8 groups, make the bound worse for good.)
_TRIANGLES, _SEPARATE, _ASCENT, _STAR_ASCENT = 50, 20, 0.1, 0.025


class Semidefinite:
    """The relaxation of all layers of a problem with ``groups`` equal groups; ``bound`` is the best so far."""

    def __init__(
        self, transitions: Floats, groups: int, device: Ints | None = None, loads: Floats | None = None
    ) -> None:
        """``device``: [layers, experts] the group of each expert in a good placement, to start from.
        ``loads``: [layers, experts] of the experts, times what a token of the busiest group counts beside one kept.
        """
        self.pairs, self.experts, _ = transitions.shape
        self.groups, self.size = groups, self.experts // groups
        self.scale = max(float(transitions.max()), 1e-300)
        self.counts = transitions / self.scale
        wide = 2 * self.experts
        self.spectral = np.full((self.pairs, wide, wide), 1.0 / groups)
        self.multiplier = np.zeros((self.pairs, wide, wide))  # scaled by the penalty
        if device is not None:
            for pair in range(self.pairs):
                both = np.concatenate([device[pair], device[pair + 1]])
                self.spectral[pair] = both[:, None] == both[None, :]
        self.penalty = float(self.counts.mean()) * 6.0 + 1e-12
        self.triangles, self.stars = Triangles(self.pairs, wide), Stars(self.pairs, wide)
        loads = np.zeros((self.pairs + 1, self.experts)) if loads is None else loads
        self.load_cost, self.load_constant = self._load_cost(loads / self.scale)
        self.cost = self.load_cost
        self.steps = 0
        self.bound = min(by_rows(transitions, self.size), float(transitions.sum())) - float(loads.sum()) / groups

    def _load_cost(self, loads: Floats) -> tuple[Floats, float]:
        """``a' Y a / A`` of all layers as costs of entries, each pair of layers bearing half of what both share; and
        the diagonal's part, which is constant."""
        n = self.experts
        every = np.maximum(loads.sum(axis=1), 1e-300)
        pair = 2.0 * loads[:, :, None] * loads[:, None, :] / every[:, None, None]
        diagonal = np.arange(n)
        pair[:, diagonal, diagonal] = 0.0
        pair[1:-1] *= 0.5
        cost = np.zeros_like(self.multiplier)
        cost[:, :n, :n], cost[:, n:, n:] = pair[:-1], pair[1:]
        return cost, float((loads**2 / every[:, None]).sum())

    def run(self, rounds: int, deadline: float, enough: float = -np.inf) -> float:
        """Go on for some rounds, or until the bound is at most ``enough``. Returns the bound."""
        for _ in range(rounds):
            self._step()
            over = time.perf_counter() >= deadline
            if over or self.steps % _EVERY == 0:
                self.bound = min(self.bound, self.evaluate())
            if over or self.bound <= enough:
                break
        return self.bound

    def _step(self) -> None:
        self.steps += 1
        n = self.experts
        aim = self.spectral - self.multiplier
        aim = aim - self.cost / (2.0 * self.penalty)
        entries = np.clip(aim, 0.0, 1.0)
        between = np.clip(aim[:, :n, n:] + self.counts / (2.0 * self.penalty), 0.0, 1.0)
        entries[:, :n, n:] = between
        entries[:, n:, :n] = between.transpose(0, 2, 1)
        if self.pairs > 1:
            shared = np.clip(0.5 * (aim[:-1, n:, n:] + aim[1:, :n, :n]), 0.0, 1.0)
            entries[:-1, n:, n:] = shared
            entries[1:, :n, :n] = shared
        diagonal = np.arange(2 * n)
        entries[:, diagonal, diagonal] = 1.0
        before = self.spectral
        self.spectral = self._project(entries + self.multiplier)
        self.multiplier += entries - self.spectral
        if self.steps >= _TRIANGLES:
            if self.steps % _SEPARATE == 0:
                self.triangles.separate(entries)
                self.stars.separate(entries)
            self.cost = self.load_cost
            for inequalities, ascent in ((self.triangles, _ASCENT), (self.stars, _STAR_ASCENT)):
                if inequalities.price.size:
                    inequalities.ascend(entries, ascent * self.penalty)
                    self.cost = self.cost + inequalities.cost()
        if self.steps % _EVERY == 0:
            self._balance(float(np.linalg.norm(entries - self.spectral)), float(np.linalg.norm(self.spectral - before)))

    def _balance(self, primal: float, dual: float) -> None:
        """Keep the two residuals of one size."""
        factor = 1.0
        if primal > 3.0 * dual:
            factor = 1.5
        elif dual > 3.0 * primal:
            factor = 1.0 / 1.5
        self.penalty *= factor
        self.multiplier /= factor

    def _project(self, matrix: Floats) -> Floats:
        """The nearest matrix whose rows add up as they must, with eigenvalues in [0, 2m] that add up to 2m (R - 1)."""
        centred = self._centre(matrix)
        values, vectors = np.linalg.eigh(centred)
        values = capped(values, 2.0 * self.size, 2.0 * self.size * (self.groups - 1))
        return np.asarray((vectors * values[:, None, :]) @ vectors.transpose(0, 2, 1) + 1.0 / self.groups)

    def _centre(self, matrix: Floats) -> Floats:
        """Without the mean of each row and column of each of the four blocks; symmetric."""
        n = self.experts
        blocks = matrix.reshape(-1, 2, n, 2, n)
        centred = blocks - blocks.mean(axis=2, keepdims=True)
        centred -= centred.mean(axis=4, keepdims=True)
        flat = centred.reshape(matrix.shape)
        return np.asarray(0.5 * (flat + flat.transpose(0, 2, 1)))

    def evaluate(self) -> float:
        """The bound that the present multipliers prove."""
        n, m = self.experts, self.size
        multiplier = self.penalty * 0.5 * (self.multiplier + self.multiplier.transpose(0, 2, 1))
        total = 0.0
        values = np.linalg.eigvalsh(self._centre(multiplier))
        total += 2.0 * m * float(values[:, 1 - self.groups :].sum()) if self.groups > 1 else 0.0
        total += float(multiplier.sum()) / self.groups
        total += self.triangles.total + self.stars.total - self.load_constant
        gain = self.counts - 2.0 * multiplier[:, :n, n:] - self.cost[:, :n, n:]
        by_row, by_column = largest(gain, m).sum(axis=1), largest(gain.transpose(0, 2, 1), m).sum(axis=1)
        total += float(np.minimum(by_row, by_column).sum())
        within = np.zeros((self.pairs + 1, n, n))
        within[:-1] -= multiplier[:, :n, :n] + 0.5 * self.cost[:, :n, :n]
        within[1:] -= multiplier[:, n:, n:] + 0.5 * self.cost[:, n:, n:]
        diagonal = np.arange(n)
        total += float(within[:, diagonal, diagonal].sum())
        within[:, diagonal, diagonal] = -np.inf
        if m > 1:
            total += float(largest(within, m - 1).sum())
        magnitude = float(np.abs(multiplier).sum()) + float(np.abs(gain).sum())
        return (total + _ROUNDING * 1e-3 * magnitude) * self.scale * (1.0 + _ROUNDING)


def largest(matrix: Floats, number: int) -> Floats:
    """Sum of the ``number`` largest entries of each row; [..., rows, columns] to [..., rows]."""
    columns = matrix.shape[-1]
    if number >= columns:
        return np.asarray(matrix.sum(axis=-1))
    return np.asarray(np.partition(matrix, columns - number, axis=-1)[..., columns - number :].sum(axis=-1))


def by_rows(transitions: Floats, size: int) -> float:
    """The simple bound: whatever the groups, an expert keeps at most its ``size`` strongest partners."""
    kept = np.minimum(largest(transitions, size).sum(axis=1), largest(transitions.transpose(0, 2, 1), size).sum(axis=1))
    return float(kept.sum())


def capped(values: Floats, cap: float, total: float) -> Floats:
    """Project each row to 0 <= x <= cap with the given sum: clip(x - t) for the t that gives it, by bisection."""
    low, high = values.min(axis=1) - cap, values.max(axis=1)
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = np.clip(values - middle[:, None], 0.0, cap).sum(axis=1) > total
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.asarray(np.clip(values - (0.5 * (low + high))[:, None], 0.0, cap))
