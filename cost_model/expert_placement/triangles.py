"""Triangle inequalities of the semidefinite relaxation: if i is with j and j with k, then i is with k."""

from __future__ import annotations

import numpy as np

from .problem import Floats, Ints

#: Inequalities added for a pair of layers at a time, by at least how much they must be broken, and most kept in all.
_ADDED, _BROKEN, _MOST = 2500, 0.03, 200_000


class Triangles:
    """Inequalities ``z_ij + z_jk - z_ik <= 1`` on matrices [pairs, n, n], with multipliers of at least 0."""

    def __init__(self, pairs: int, n: int) -> None:
        self.shape = (pairs, n, n)
        empty = np.zeros(0, np.int64)
        #: Flat positions of z_ij, z_jk and z_ik.
        self.first, self.second, self.third = empty, empty, empty
        self.price = np.zeros(0)

    def separate(self, matrices: Floats) -> int:
        """Add the inequalities that the matrices break most; forget those without a price. Returns how many are new."""
        kept = self.price > 0.0
        self.first, self.second, self.third = self.first[kept], self.second[kept], self.third[kept]
        self.price = self.price[kept]
        if self.price.size >= _MOST:
            return 0
        n = self.shape[1]
        found = [self._worst(matrix, pair * n * n) for pair, matrix in enumerate(matrices)]
        first, second, third = (np.concatenate(column) for column in zip(*found, strict=True))
        known = set(zip(self.first.tolist(), self.second.tolist(), strict=True))
        new = np.array([one not in known for one in zip(first.tolist(), second.tolist(), strict=True)], np.bool_)
        self.first, self.second = np.append(self.first, first[new]), np.append(self.second, second[new])
        self.third = np.append(self.third, third[new])
        self.price = np.append(self.price, np.zeros(int(new.sum())))
        return int(new.sum())

    def _worst(self, matrix: Floats, offset: int) -> tuple[Ints, Ints, Ints]:
        n = len(matrix)
        codes, values = [], []
        above = np.triu(np.ones((n, n), np.bool_), 1)
        single = matrix.astype(np.float32)
        for middle in range(n):
            broken = single[:, middle][:, None] + single[middle][None, :] - single
            broken[~above] = 0.0
            broken[middle] = broken[:, middle] = 0.0
            at = np.flatnonzero(broken.ravel() > 1.0 + _BROKEN)
            codes.append(middle * n * n + at)
            values.append(broken.ravel()[at])
        code, value = np.concatenate(codes), np.concatenate(values)
        if code.size > _ADDED:
            code = code[np.argpartition(-value, _ADDED)[:_ADDED]]
        j, rest = np.divmod(code, n * n)
        i, k = np.divmod(rest, n)
        return offset + i * n + j, offset + j * n + k, offset + i * n + k

    def ascend(self, matrices: Floats, step: float) -> None:
        """Raise the prices of what is broken, lower those of what is not."""
        flat = matrices.ravel()
        excess = flat[self.first] + flat[self.second] - flat[self.third] - 1.0
        self.price = np.maximum(0.0, self.price + step * excess)

    def cost(self) -> Floats:
        """[pairs, n, n] symmetric: what the prices add to the cost of each entry, as one variable with its mirror."""
        size = int(np.prod(self.shape))
        total = np.bincount(self.first, self.price, size) + np.bincount(self.second, self.price, size)
        cost = (total - np.bincount(self.third, self.price, size)).reshape(self.shape)
        return np.asarray(cost + cost.transpose(0, 2, 1))

    @property
    def total(self) -> float:
        return float(self.price.sum())
