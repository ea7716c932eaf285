"""A folder of dumps: what each pass did to a graph, one numbered pair of files a pass.

``NNN-pass.json`` records every pass (time, sizes, which files hold the graph before and after); ``NNN-pass.ir`` is
written where the pass changed something. ``NNN-input.ir`` is the graph before the first pass. Several graphs, and
several processes, may share a folder: numbers are claimed by creating the ``.json`` file exclusively.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import OptionError

_NUMBERED = re.compile(r"(\d{3,})-(.+)\.json")


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    ``seconds`` is its own time without verification; ``before`` and ``after`` name the files that hold the graph on
    either side (equal when nothing changed). ``failed`` is the error's text, empty if it went well.
    """

    index: int
    text: str
    graph: str
    phase: str
    seconds: float
    changed: bool
    ops_before: int
    ops_after: int
    before: str = ""
    after: str = ""
    failed: str = ""

    @property
    def name(self) -> str:
        return self.text.partition("{")[0]


class DumpFolder:
    """Writes the numbered files of one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next = 0
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"cannot write dumps to {path}: {error.strerror}", remedy="choose another EFFCC_DUMP / dump_dir"
            ) from error

    def claim(self, name: str) -> tuple[int, str]:
        """The next free number and the stem ``NNN-name``; an empty ``.json`` file holds the place."""
        while True:
            stem = f"{self._next:03d}-{name}"
            taken = any(self.path.glob(f"{self._next:03d}-*.json"))
            self._next += 1
            if taken:
                continue
            try:
                (self.path / f"{stem}.json").open("x").close()
            except FileExistsError:
                continue
            return self._next - 1, stem

    def write(self, file: str, text: str) -> str:
        (self.path / file).write_text(text, encoding="utf-8")
        return file

    def write_record(self, stem: str, record: PassRecord) -> None:
        self.write(f"{stem}.json", json.dumps(asdict(record), indent=1) + "\n")


def read_records(path: Path) -> tuple[PassRecord, ...]:
    """The records of a dump folder in order. Files that are not records are passed over."""
    return tuple(_records(path))


def _records(path: Path) -> Iterator[PassRecord]:
    names = {field.name for field in fields(PassRecord)}
    numbered = [(int(match[1]), file) for file in path.iterdir() if (match := _NUMBERED.fullmatch(file.name))]
    for _, file in sorted(numbered):
        try:
            data: Any = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # claimed by a pass that has not finished
        if isinstance(data, dict) and names.issuperset(data):
            yield PassRecord(**data)
