"""The arrays of a Triton kernel: how long each rank's part of them is, and where they reach beyond a rank's end.

Every dimension of a Triton array is a power of two; that of a rank in a matrix product is at least 16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from ...ir.cascade import ranks_of
from ...ir.tile import Dot, Reduce, Store, walk
from ..tiles.errors import NotLowerable
from ..tiles.facts import Facts

#: The shortest dimension of a matrix product's operands.
LEAST_IN_PRODUCT = 16
#: Elements that an array may have (Triton's own limit is 2**20).
LARGEST_ARRAY = 1 << 18


@dataclass
class Blocks(Facts):
    """``even`` are the streamed ranks of which the printer is in a loop over whole tiles only."""

    even: set[sympy.Symbol] = field(default_factory=set)
    in_product: frozenset[sympy.Symbol] = frozenset()
    #: Sizes that are written in the kernel: of ranks that arrays hold all of.
    whole: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        found: set[sympy.Symbol] = set()
        for item in walk(self.program.body):
            if isinstance(item, Dot):
                found |= ranks_of(item.left) | ranks_of(item.right)
        self.in_product = frozenset(s for s in found if not self.is_point(s))
        self.whole = frozenset(self._whole())
        for name, ranks in self.values.items():
            elements = 1
            for s in ranks:
                elements *= self.length(s)
            if elements > LARGEST_ARRAY:
                raise NotLowerable(f"a tile of {name} has {elements} elements", where=name)

    def _whole(self) -> set[str]:
        alias = dict(self.program.alias)
        ranks = {s for dims in self.values.values() for s in dims}
        for item in walk(self.program.body):
            if isinstance(item, Reduce | Dot):
                ranks.update(item.reduced)
            elif isinstance(item, Store):
                ranks |= ranks_of(item.target)
        return {alias.get(s, s).name for s in ranks if s not in self.steps}

    def add(self, rank: sympy.Symbol, size: int, step: int) -> None:
        """A rank that a loop of the printer's own walks."""
        self.sizes = {**self.sizes, rank.name: size}
        self.steps[rank] = step
        self.whole |= {rank.name}
        self.in_product |= {rank}

    def length(self, rank: sympy.Symbol) -> int:
        """Elements of an array along a rank."""
        own = self.steps.get(rank) or 1 << (self.size(rank) - 1).bit_length()
        if own & (own - 1):
            raise NotLowerable(f"a tile of {own} coordinates of {rank} is no power of two", where=str(rank))
        if rank not in self.in_product or own >= LEAST_IN_PRODUCT:
            return own
        if rank in self.steps and self.size(rank) > own:
            raise NotLowerable(f"tiles of {own} coordinates of {rank} in a matrix product", where=str(rank))
        return LEAST_IN_PRODUCT

    def has_tail(self, rank: sympy.Symbol) -> bool:
        """Whether an array may reach beyond the rank's end here."""
        return rank not in self.even and self.is_uneven(rank)

    def is_uneven(self, rank: sympy.Symbol) -> bool:
        return not self.is_point(rank) and self.size(rank) % self.length(rank) != 0

    def is_argument(self, name: str) -> bool:
        """Whether a size is passed to the kernel, rather than written in it: those of walked ranks and constants."""
        return name not in self.whole

    def kept(self, ranks: tuple[sympy.Symbol, ...]) -> tuple[sympy.Symbol, ...]:
        """Those ranks that an array has as dimensions."""
        return tuple(s for s in ranks if not self.is_point(s))
