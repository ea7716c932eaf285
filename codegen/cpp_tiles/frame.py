"""What the printer knows of a program: its ranks' walks, its values' places in scratch, its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy

from ...ir.cascade import accesses, tensor_name
from ...ir.tile import MAKERS, Cases, Loop, Map, Statement, expressions, walk
from ..tiles.facts import Facts, read_by
from .names import count, inside, origin, pointer, size_name

#: A row of this many elements or more gets a few more, so that rows do not fall onto the same cache sets.
_PADDED, _PADDING = 64, 16


@dataclass
class Frame(Facts):
    """The sizes also decide how large the scratch is; all other sizes are arguments of the kernel."""

    #: Ranks whose loops are open where the printer is, and those that are open where a value is first made. A value
    #: has a whole dimension for a rank that is walked only later; a statement inside that loop means the loop's part
    #: of it.
    walked: set[sympy.Symbol] = field(default_factory=set)
    made_in: dict[str, frozenset[sympy.Symbol]] = field(default_factory=dict)
    #: Value -> statements that make or change it, and that read it.
    makers: Counter[str] = field(default_factory=Counter)
    readers: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._note_scopes(self.program.body, frozenset())
        for item in walk(self.program.body):
            if isinstance(item, MAKERS):
                self.makers[tensor_name(item.target)] += 1
            self.readers.update({tensor_name(each) for e in expressions(item) for each in accesses(e)})

    def _note_scopes(self, body: Sequence[Statement], walked: frozenset[sympy.Symbol]) -> None:
        for item in body:
            if isinstance(item, Loop):
                self._note_scopes(item.body, walked | {item.rank})
            elif isinstance(item, Cases):
                self._note_scopes((*item.full, *item.partial), walked)
            elif isinstance(item, MAKERS):
                self.made_in.setdefault(tensor_name(item.target), walked)

    # Ranks ------------------------------------------------------------------------------------------------------------

    def coordinate(self, rank: sympy.Symbol) -> str:
        """The rank's coordinate in the whole, inside the loops of a nest."""
        if rank not in self.walked:
            return inside(rank)
        return origin(rank) if self.is_point(rank) else f"({origin(rank)} + {inside(rank)})"

    def length(self, rank: sympy.Symbol) -> str:
        """How many coordinates a tile has."""
        return count(rank) if rank in self.walked else size_name(rank.name)

    def extent(self, name: str, rank: sympy.Symbol) -> str:
        """How many coordinates a value has room for."""
        return str(self.steps[rank]) if rank in self.made_in[name] else size_name(rank.name)

    def room(self, name: str, rank: sympy.Symbol) -> int:
        return self.steps[rank] if rank in self.made_in[name] else self.size(rank)

    def is_part(self, name: str, rank: sympy.Symbol) -> bool:
        """Whether a value's dimension is whole, and the printer inside a loop that walks it."""
        return rank in self.walked and rank not in self.made_in[name]

    def start(self, name: str) -> str:
        """Where the part of a value begins that the open loops mean."""
        parts = [
            f"{origin(rank)} * ({step})"
            for rank, step in zip(self.values[name], self.strides(name), strict=True)
            if self.is_part(name, rank)
        ]
        return " + ".join([pointer(name), *parts])

    # Values -----------------------------------------------------------------------------------------------------------

    def padding(self, name: str) -> int:
        ranks = self.values[name]
        return _PADDING if len(ranks) == 2 and self.room(name, ranks[-1]) >= _PADDED else 0

    def strides(self, name: str) -> list[str]:
        """Elements between neighbours in each dimension of a value."""
        ranks = self.values[name]
        found, step = [], "1"
        for position in reversed(range(len(ranks))):
            found.append(step)
            extent = self.extent(name, ranks[position])
            if position == len(ranks) - 1 and self.padding(name):
                extent = f"({extent} + {self.padding(name)})"
            step = extent if step == "1" else f"{step} * {extent}"
        return found[::-1]

    def elements(self, name: str) -> str:
        """How many elements a value takes, as C++."""
        ranks = self.values[name]
        parts = [self.extent(name, rank) for rank in ranks]
        if self.padding(name):
            parts[-1] = f"({parts[-1]} + {self.padding(name)})"
        return " * ".join(parts) or "1"

    def bytes(self, name: str, item_bytes: int) -> int:
        total = 1
        for rank in self.values[name]:
            total *= self.room(name, rank)
        if self.padding(name):
            last = self.room(name, self.values[name][-1])
            total = total // last * (last + self.padding(name))
        return -(-total * item_bytes // 64) * 64


def last_reads(body: Sequence[Statement]) -> dict[str, int]:
    """Value -> position of the last statement of the body that reads or changes it."""
    return {name: position for position, item in enumerate(body) for name in read_by(item)}


def reused(body: Sequence[Statement], frame: Frame, outer: frozenset[str]) -> dict[str, str]:
    """Values that can lie where another one lay: a map's result over an operand of the same shape, read for the last
    time.

    ``outer`` are values that live beyond the body.
    """
    last = last_reads(body)
    found: dict[str, str] = {}
    first: set[str] = set(outer)
    for position, item in enumerate(body):
        if not isinstance(item, MAKERS):
            continue
        name = tensor_name(item.target)
        if isinstance(item, Map) and name not in first:
            for each in accesses(item.body):
                other = tensor_name(each)
                if other in outer or other not in frame.values or last[other] != position or other in found.values():
                    continue
                same = frame.made_in[other] >= frame.made_in[name] and frame.padding(other) == frame.padding(name)
                if tuple(each.args) == tuple(item.target.args) and same:
                    found[name] = other
                    break
        first.add(name)
    return found
