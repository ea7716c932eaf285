"""The model's source as far as its graphs know it: every line that made an op, and the whole file where it is here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..ir.graph import Graph, Location
from .lineage import scopes

#: Larger files are shown by the lines that are known alone.
LARGEST = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """``lines``: number -> text. ``whole`` says that the file was found and agrees with what the graphs say of it;
    else only the lines that made ops are known. ``used`` are their numbers."""

    path: str
    lines: Mapping[int, str]
    used: frozenset[int]
    whole: bool

    @property
    def name(self) -> str:
        return short_path(self.path)


def model_source(graphs: Iterable[Graph], search: Iterable[Path] = ()) -> list[SourceFile]:
    """The files that the graphs' ops come from, the one with the most lines first. Files that are not at their recorded
    path are looked for by name in the folders ``search``."""
    known: dict[str, dict[int, str]] = {}
    for graph in graphs:
        for inner in scopes(graph).values():
            for node in inner.nodes:
                if node.location.file and node.op != "input":
                    _note(known, node.location)
    found = [_file(path, lines, list(search)) for path, lines in known.items()]
    return sorted(found, key=lambda file: (-len(file.used), file.path))


def _note(known: dict[str, dict[int, str]], location: Location) -> None:
    lines = known.setdefault(location.file, {})
    lines[location.line] = lines.get(location.line) or location.source


def _file(path: str, known: Mapping[int, str], search: list[Path]) -> SourceFile:
    for candidate in (Path(path), *(folder / os.path.basename(path) for folder in search)):
        text = _read(candidate)
        if text is None:
            continue
        lines = dict(enumerate(text.splitlines(), start=1))
        # The file may have been edited since: then its lines would be shown for others.
        if all(lines.get(number, "").strip() == source.strip() for number, source in known.items() if source):
            return SourceFile(path, lines, frozenset(known), True)
    return SourceFile(path, dict(sorted(known.items())), frozenset(known), False)


def _read(path: Path) -> str | None:
    try:
        if path.suffix != ".py" or path.stat().st_size > LARGEST:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError):
        return None


def short_path(path: str) -> str:
    """Without what stands before an installed package, or before the working directory."""
    for marker in ("/site-packages/", "/dist-packages/"):
        if marker in path:
            return path.rpartition(marker)[2]
    here = os.getcwd() + os.sep
    return path.removeprefix(here)
