"""Factors of dimensions: which ranks a dimension of a graph value is made of.

A dimension that is split somewhere (``[b, m, 512] -> [b, m, 8, 64]``) is written with two ranks everywhere it goes:
``c = h*64 + d``. So each dimension is a list of *factors*, outer first, and dimensions that one op walks together have
the same factors. Factors are found by union-find while the ops are read; a split reaches every dimension in the class.
A dimension of size 1 has no factors.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.types import Size
from .sizes import divide, equal


class Axes:
    """The classes of factors. A factor is an int; ``resolve`` gives the final factors of a list."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[Size] = []
        self._parts: list[tuple[int, int] | None] = []

    def new(self, size: Size) -> tuple[int, ...]:
        """The factors of a dimension of its own."""
        if equal(size, 1):
            return ()
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._parts.append(None)
        return (len(self._parent) - 1,)

    def size(self, factor: int) -> Size:
        return self._size[self._root(factor)]

    def resolve(self, factors: Sequence[int]) -> list[int]:
        """The roots that a list of factors stands for now, outer first."""
        found: list[int] = []
        for factor in factors:
            root = self._root(factor)
            parts = self._parts[root]
            found += [root] if parts is None else self.resolve(parts)
        return found

    def unify(self, first: Sequence[int], second: Sequence[int]) -> bool:
        """Give two lists the same factors. False if they have no common ones (6 = 2*3 against 3*2)."""
        left, right = self.resolve(first), self.resolve(second)
        while left and right:
            a, b = self._root(left[-1]), self._root(right[-1])
            if self._parts[a] or self._parts[b]:
                left, right = self.resolve(left), self.resolve(right)
                continue
            if a == b or equal(self._size[a], self._size[b]):
                self._parent[b] = a
                left.pop()
                right.pop()
            elif not (self._split(a, self._size[b]) or self._split(b, self._size[a])):
                return False
        return not left and not right

    def _root(self, factor: int) -> int:
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor

    def _split(self, factor: int, inner: Size) -> bool:
        outer = divide(self._size[factor], inner)
        if outer is None:
            return False
        self._parts[factor] = (*self.new(outer), *self.new(inner))  # type: ignore[assignment]
        return True
