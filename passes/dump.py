"""A folder of dumps: what each pass did to a graph, one numbered pair of files a pass.

``NNN-pass.json`` records every pass (time, sizes, which files hold the graph before and after); ``NNN-pass.ir`` is
written where the pass changed something. ``NNN-input.ir`` is the graph before the first pass. Several graphs, and
several processes, may share a folder: a number is claimed by creating its ``.json`` file, and given up again if another
process is found to have claimed it too.

Of a pass that failed, ``NNN-pass-failed.ir`` is the graph that it was given, under a comment with the command that
repeats the failure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import OptionError, OutputError

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
            index, stem = self._next, f"{self._next:03d}-{name}"
            self._next += 1
            if self._claims(index):
                continue
            file = self.path / f"{stem}.json"
            try:
                file.open("x").close()
            except FileExistsError:
                continue
            except OSError as error:
                raise self._unwritable(file, error) from error
            # Whoever comes second to this line sees the other's file, so that no two ever keep one number.
            if self._claims(index) == [file]:
                return index, stem
            file.unlink(missing_ok=True)

    def _claims(self, index: int) -> list[Path]:
        return list(self.path.glob(f"{index:03d}-*.json"))

    def write(self, file: str, text: str) -> str:
        """Write a file of the folder; its name. Raises OutputError."""
        try:
            (self.path / file).write_text(text, encoding="utf-8", errors="surrogatepass")
        except OSError as error:
            raise self._unwritable(self.path / file, error) from error
        return file

    def _unwritable(self, file: Path, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write the dump: {error.strerror}", where=str(file), remedy="choose another EFFCC_DUMP / dump_dir"
        )

    def write_record(self, stem: str, record: PassRecord) -> None:
        self.write(f"{stem}.json", json.dumps(asdict(record), indent=1) + "\n")


def read_records(path: Path) -> tuple[PassRecord, ...]:
    """The records of a dump folder in order. Files that are not records are passed over."""
    return tuple(_records(path))


def _records(path: Path) -> Iterator[PassRecord]:
    numbered = [(int(match[1]), file) for file in path.iterdir() if (match := _NUMBERED.fullmatch(file.name))]
    for _, file in sorted(numbered):
        try:
            data: Any = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # claimed by a pass that has not finished
        if _is_record(data):
            yield PassRecord(**data)


def _is_record(data: Any) -> bool:
    if not isinstance(data, dict):
        return False
    kinds = {"int": int, "str": str, "bool": bool, "float": float}
    known = {field.name: kinds[str(field.type)] for field in fields(PassRecord)}
    needed = {field.name for field in fields(PassRecord) if field.default is MISSING}
    return needed <= data.keys() <= known.keys() and all(type(value) is known[name] for name, value in data.items())
