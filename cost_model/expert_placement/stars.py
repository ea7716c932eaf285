"""Star inequalities of the semidefinite relaxation.

If s shares a group with each of the set T, then all of T share it; so at most one of T counts that shares no group with
another: ``sum of z_st over t in T - sum of z_tt' over pairs of T <= 1`` for every s and T. With two members T they are
the triangle inequalities; with more they cut off what those leave: an expert that is half with each of three others
which are not with each other. (The 2-partition inequalities with one side of one; Grötschel and Wakabayashi, Facets of
the clique partitioning polytope, 1990.)
"""

from __future__ import annotations

import numpy as np

from .problem import Floats, Ints

#: Most members of T; by at least how much an inequality must be broken, and most kept in all; least z that joins T.
_MEMBERS, _BROKEN, _MOST, _LEAST = 9, 0.03, 100_000, 0.01


class Stars:
    """Inequalities on matrices [pairs, n, n] with three members of T or more, with multipliers of at least 0."""

    def __init__(self, pairs: int, n: int) -> None:
        self.shape = (pairs, n, n)
        #: One entry for each term of an inequality: its inequality, its flat position, 1 or -1.
        self.row, self.at, self.sign = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        self.price = np.zeros(0)
        self._keys: list[bytes] = []

    def separate(self, matrices: Floats) -> int:
        """Add the inequalities that a greedy choice of T finds broken, one for each s; forget those without a price.
        Returns how many are new."""
        self._forget()
        if self.price.size >= _MOST:
            return 0
        known = set(self._keys)
        new = 0
        for pair, matrix in enumerate(matrices):
            centre, members = _greedy(matrix)
            keys = [bytes([pair & 255, pair >> 8]) + star.tobytes() for star in np.column_stack([centre, members])]
            fresh = np.array([key not in known for key in keys], np.bool_)
            self._keys += [key for key, one in zip(keys, fresh.tolist(), strict=True) if one]
            self._add(pair, centre[fresh], members[fresh])
            new += int(fresh.sum())
        return new

    def _forget(self) -> None:
        kept = self.price > 0.0
        number = np.cumsum(kept) - 1
        terms = kept[self.row] if self.row.size else np.zeros(0, np.bool_)
        self.row, self.at, self.sign = number[self.row[terms]], self.at[terms], self.sign[terms]
        self.price = self.price[kept]
        self._keys = [key for key, one in zip(self._keys, kept.tolist(), strict=True) if one]

    def _add(self, pair: int, centre: Ints, members: Ints) -> None:
        """``members``: [stars, _MEMBERS], -1 where there are fewer."""
        n, count = self.shape[1], len(centre)
        offset = pair * n * n
        row = np.arange(self.price.size, self.price.size + count)
        first, second = np.triu_indices(_MEMBERS, 1)
        there = members >= 0
        between = there[:, first] & there[:, second]
        spokes = offset + centre[:, None] * n + members
        rim = offset + members[:, first] * n + members[:, second]
        rows = np.broadcast_to(row[:, None], there.shape)[there], np.broadcast_to(row[:, None], between.shape)[between]
        self.row = np.concatenate([self.row, *rows])
        self.at = np.concatenate([self.at, spokes[there], rim[between]])
        self.sign = np.concatenate([self.sign, np.ones(int(there.sum())), np.full(int(between.sum()), -1.0)])
        self.price = np.append(self.price, np.zeros(count))

    def ascend(self, matrices: Floats, step: float) -> None:
        """Raise the prices of what is broken, lower those of what is not."""
        left = np.bincount(self.row, self.sign * matrices.ravel()[self.at], self.price.size)
        self.price = np.maximum(0.0, self.price + step * (left - 1.0))

    def cost(self) -> Floats:
        """[pairs, n, n] symmetric: what the prices add to the cost of each entry, as one variable with its mirror."""
        cost = np.bincount(self.at, self.sign * self.price[self.row], int(np.prod(self.shape))).reshape(self.shape)
        return np.asarray(cost + cost.transpose(0, 2, 1))

    @property
    def total(self) -> float:
        return float(self.price.sum())


def _greedy(matrix: Floats) -> tuple[Ints, Ints]:
    """For each s the T that grows by what adds most: centres and members [stars, _MEMBERS], in order, of those that are
    broken by enough and have three members."""
    n = len(matrix)
    every = np.arange(n)
    gain = matrix.copy()
    gain[every, every] = -np.inf
    members = np.full((n, _MEMBERS), -1)
    value = np.zeros(n)
    for number in range(_MEMBERS):
        best = gain.argmax(axis=1)
        more = gain[every, best]
        grows = more > _LEAST
        if not grows.any():
            break
        members[grows, number] = best[grows]
        value[grows] += more[grows]
        gain[grows] -= matrix[best[grows]]
        gain[every, best] = -np.inf
    broken = np.flatnonzero((value > 1.0 + _BROKEN) & (members[:, 2] >= 0))
    return broken, -np.sort(-members[broken], axis=1)
