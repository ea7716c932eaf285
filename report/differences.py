"""What each pass changed, side by side, as far as there is room in a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OptionError
from ..inspection.changes import Change, changes
from ..inspection.links import without_places
from ..inspection.side_by_side import Row, side_by_side
from ..inspection.stages import Dump, Stage, open_dump

#: Rows of one pass, characters of all passes, and the longest text compared: a comparison takes time with its square.
MOST_ROWS, MOST_CHARACTERS, MOST_LINES = 160, 500_000, 12_000


@dataclass(frozen=True)
class PassView:
    """A pass with the rows of its comparison; ``left_out`` rows did not fit."""

    stage: Stage
    change: Change
    rows: tuple[Row, ...]
    left_out: int


def pass_views(dumps: Path | None) -> list[PassView]:
    """The passes recorded in a folder of dumps; none where there is no such folder, or nothing in it."""
    if dumps is None or not dumps.is_dir():
        return []
    try:
        dump = open_dump(dumps)
    except OptionError:
        return []
    made = changes(dump) if _readable(dump) else {}
    left = MOST_CHARACTERS
    found: list[PassView] = []
    before: dict[str, Stage] = {}
    for stage in dump.stages:
        rows: Sequence[Row] = ()
        earlier = before.get(stage.graph)
        if made and stage.changed and not stage.begins and earlier is not None and left > 0:
            rows = _rows(earlier, stage)
        shown = rows[:MOST_ROWS]
        left -= sum(len(row.left) + len(row.right) + 60 for row in shown)
        found.append(PassView(stage, made.get(stage.index, Change({}, {}, 0, 0)), tuple(shown), len(rows) - len(shown)))
        if stage.changed or stage.begins:
            before[stage.graph] = stage
    return found


def _readable(dump: Dump) -> bool:
    try:
        for stage in dump.stages:
            if stage.changed and not stage.failed:
                stage.text()
    except OptionError:  # records without their texts
        return False
    return True


def _rows(before: Stage, after: Stage) -> list[Row]:
    old, new = without_places(before.text()), without_places(after.text())
    if max(old.count("\n"), new.count("\n")) > MOST_LINES:
        return []
    return side_by_side(old, new, context=1)
