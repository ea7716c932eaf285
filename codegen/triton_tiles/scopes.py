"""The lines of a kernel while it is printed: one list for each open loop, and what has been computed in them.

A line goes to the outermost loop in which all that it reads is known: it then stands before the loops inside.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import sympy

#: What an array holds: numbers of the type computed in; numbers of another floating type; integers; truth values.
FLOAT, NARROW, INT, BOOL = "float", "narrow", "int", "bool"


@dataclass(frozen=True)
class Piece:
    """``text`` computes an array with the dimensions ``dims``, its elements of a ``kind``. ``depth``: inside
    how many loops it is known. ``reads`` are the values of the program that it depends on."""

    text: str
    dims: tuple[sympy.Symbol, ...]
    kind: str
    depth: int
    reads: frozenset[str] = frozenset()
    dtype: str = ""

    @property
    def is_plain(self) -> bool:
        """A name or a number."""
        return self.text.isidentifier() or self.is_literal

    @property
    def is_literal(self) -> bool:
        text = self.text.removeprefix("-")
        return text[:1].isdigit() or text.startswith("float(")


class Scopes:
    def __init__(self) -> None:
        self.lines: list[list[str]] = [[]]
        self.known: dict[Hashable, Piece] = {}
        self._changed: list[frozenset[str]] = []
        self._count = 0

    @property
    def depth(self) -> int:
        return len(self.lines) - 1

    def write(self, line: str, depth: int | None = None) -> None:
        self.lines[self.depth if depth is None else depth].append(line)

    def fresh(self) -> str:
        self._count += 1
        return f"x{self._count}"

    def named(self, key: Hashable, piece: Piece, hint: str = "") -> Piece:
        """The piece under a name of its own, computed in the outermost loop that can."""
        found = self.known.get(key)
        if found is not None:
            return found
        if piece.is_plain:
            self.known[key] = piece
            return piece
        name = hint or self.fresh()
        self.write(f"{name} = {piece.text}", piece.depth)
        found = Piece(name, piece.dims, piece.kind, piece.depth, piece.reads, piece.dtype)
        self.known[key] = found
        return found

    def open(self, changed: frozenset[str]) -> None:
        """Enter a loop whose body changes these values."""
        for name in changed:
            self.forget(name)
        self.lines.append([])
        self._changed.append(changed)

    def close(self) -> list[str]:
        """Leave a loop: the lines of its body."""
        lines = self.lines.pop()
        changed = self._changed.pop()
        self.known = {
            key: piece for key, piece in self.known.items() if piece.depth <= self.depth and not piece.reads & changed
        }
        return lines

    def forget(self, value: str) -> None:
        """A value changes: what was computed from it holds no more."""
        self.known = {key: piece for key, piece in self.known.items() if value not in piece.reads}

    def depth_of(self, value: str, made: int) -> int:
        """Inside how many loops the value's present content is known, if it was made inside ``made`` loops."""
        inside = [level for level, changed in enumerate(self._changed, start=1) if value in changed]
        return max([made, *inside])
