"""The model's source in the page: the lines that made ops, with the time and the memory of each."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..inspection.model_source import SourceFile, model_source
from ..ir.graph import Graph
from ..ir.plan import Plan
from ..summary import peak_position

#: Lines shown around each line that made an op, and in all.
AROUND, MOST_LINES = 4, 4000


@dataclass(frozen=True)
class Line:
    """``key`` is ``model.py:88``, what steps and buffers call it; ``seconds`` and ``bytes`` (at the peak) are theirs.
    ``gap`` says that lines before it are left out."""

    number: int
    text: str
    key: str
    used: bool
    seconds: float
    bytes: int
    gap: bool


@dataclass(frozen=True)
class Listing:
    name: str
    whole: bool
    lines: tuple[Line, ...]


def source_listings(plan: Plan, graphs: Iterable[Graph], search: Iterable[Path] = ()) -> list[Listing]:
    """The files of the model, the one with the most ops first."""
    seconds: dict[str, float] = {}
    for step in plan.steps:
        key = place(step.source)
        seconds[key] = seconds.get(key, 0.0) + step.seconds
    position = peak_position(plan)
    held: dict[str, int] = {}
    for buffer in plan.buffers:
        if buffer.tier == "device" and buffer.lower <= position < buffer.upper:
            held[place(buffer.source)] = held.get(place(buffer.source), 0) + buffer.bytes
    left = MOST_LINES
    found = []
    for file in model_source(graphs, search):
        lines = tuple(_lines(file, seconds, held))[: max(left, 0)]
        left -= len(lines)
        if lines:
            found.append(Listing(file.name, file.whole, lines))
    return found


def _lines(file: SourceFile, seconds: dict[str, float], held: dict[str, int]) -> Iterable[Line]:
    near = {number + offset for number in file.used for offset in range(-AROUND, AROUND + 1)}
    last = 0
    for number in sorted(near & file.lines.keys()):
        key = f"{os.path.basename(file.path)}:{number}"
        used = number in file.used
        yield Line(
            number, file.lines[number].rstrip(), key, used, seconds.get(key, 0.0), held.get(key, 0), number > last + 1
        )
        last = number


def place(source: str) -> str:
    """``model.py:88`` of ``model.py:88 "h = self.up(x)"``."""
    return source.partition(' "')[0]
