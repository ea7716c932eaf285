"""Two texts side by side: rows of equal, changed, added and removed lines, long equal stretches folded."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """``kind``: equal, changed, added, removed or folded (``left_line`` then counts the lines left out). Line numbers
    count from 1, 0 where that side has no line."""

    kind: str
    left_line: int = 0
    left: str = ""
    right_line: int = 0
    right: str = ""


#: How a row of each kind begins on either side: readable without colour.
MARKS = {"equal": (" ", " "), "changed": ("~", "~"), "added": (" ", "+"), "removed": ("-", " ")}


def side_by_side(before: str, after: str, context: int = 2) -> list[Row]:
    """The rows of a comparison; empty where the texts are equal. ``context``: equal lines kept around each change."""
    left, right = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    opcodes = matcher.get_opcodes()
    if all(tag == "equal" for tag, *_ in opcodes):
        return []
    rows: list[Row] = []
    for index, (tag, i1, i2, j1, j2) in enumerate(opcodes):
        if tag == "equal":
            first, last = index == 0, index == len(opcodes) - 1
            rows += _equal(left, i1, i2, j1, 0 if first else context, 0 if last else context)
        elif tag == "replace":
            rows += _replaced(left, right, i1, i2, j1, j2)
        else:
            rows += [Row("removed", i + 1, left[i]) for i in range(i1, i2)]
            rows += [Row("added", right_line=j + 1, right=right[j]) for j in range(j1, j2)]
    return rows


def _equal(left: Sequence[str], i1: int, i2: int, j1: int, head: int, tail: int) -> Iterator[Row]:
    count = i2 - i1
    hidden = count - head - tail
    for offset in range(count):
        if hidden > 1 and head <= offset < count - tail:
            if offset == head:
                yield Row("folded", hidden)
            continue
        yield Row("equal", i1 + offset + 1, left[i1 + offset], j1 + offset + 1, left[i1 + offset])


def _replaced(left: Sequence[str], right: Sequence[str], i1: int, i2: int, j1: int, j2: int) -> Iterator[Row]:
    """Lines that define the same value stand beside each other; the rest is removed, then added."""
    defined = {_name(right[j]): j for j in range(j1, j2) if _name(right[j])}
    j = j1
    for i in range(i1, i2):
        match = defined.get(_name(left[i]), -1)
        if match >= j:
            yield from (Row("added", right_line=each + 1, right=right[each]) for each in range(j, match))
            yield Row("changed", i + 1, left[i], match + 1, right[match])
            j = match + 1
        else:
            yield Row("removed", i + 1, left[i])
    yield from (Row("added", right_line=each + 1, right=right[each]) for each in range(j, j2))


def _name(line: str) -> str:
    head = line.strip().partition(" ")[0]
    return head.rstrip(":") if head.startswith("%") else ""
