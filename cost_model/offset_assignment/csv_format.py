"""MiniMalloc's CSV interchange: ``id,lower,upper,size[,alignment][,hint][,gaps]`` in, the same with ``offset`` out.

Lifetimes are half-open. Gaps are written ``3-7 9-12`` (nothing in use from 3 to 7 and from 9 to 12) or ``3-7@0:128``
(only bytes 0 to 128). See https://github.com/google/minimalloc.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from dataclasses import dataclass

import numpy as np

from ...errors import MappingError
from .problem import Gap, Problem
from .tables import Ints

_REQUIRED = ("id", "lower", "upper", "size")
_GAP = re.compile(r"(-?\d+)-(-?\d+)(?:@(\d+):(\d+))?\Z")
#: Offsets are 64-bit integers, and searches add a few of them: no sum of sizes and no time may be larger.
_LARGEST = 1 << 60


@dataclass(frozen=True)
class MappingFile:
    """The rows of a file as they were read, and the problem they state."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    problem: Problem

    def solved(self, offsets: Ints) -> str:
        """The file's text with a last column ``offset``."""
        return write(self.columns, [{**row, "offset": str(o)} for row, o in zip(self.rows, offsets, strict=True)])


def read(text: str, name: str = "the file") -> MappingFile:
    """Parse a memory-mapping problem.

    Raises:
        MappingError: a column is missing, or a value is not a number or out of range; names line and column.
    """
    try:
        reader = csv.DictReader(
            io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True, skipinitialspace=True
        )
        columns = tuple(column.strip() for column in reader.fieldnames or ())
        reader.fieldnames = list(columns)
        missing = [column for column in _REQUIRED if column not in columns]
        if missing:
            raise MappingError(
                f"column {missing[0]!r} is missing",
                where=f"{name}, line 1",
                remedy="the first line names id,lower,upper,size",
            )
        if len(set(columns)) < len(columns):
            raise MappingError("a column is named twice", where=f"{name}, line 1", remedy="name each column once")
        rows = []
        values: dict[str, list[int]] = {key: [] for key in ("lower", "upper", "size", "alignment", "hint")}
        gaps: list[list[Gap]] = []
        seen: set[str] = set()
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise MappingError(
                    f"the line does not have {len(columns)} fields", where=where, remedy="give one value a column"
                )
            if row["id"] in seen:
                raise MappingError(f"id {row['id']!r} is used twice", where=where, remedy="give each buffer its own id")
            seen.add(row["id"])
            _check_row(row, values, gaps, where)
            rows.append(row)
    except csv.Error as error:
        raise MappingError(
            f"not a CSV file: {error}", where=name, remedy="see `effcc map-memory --help` for the format"
        ) from error
    if sum(values["size"]) > _LARGEST:
        raise MappingError("the sizes add up to more than 2^60 bytes", where=name, remedy="give sizes in bytes")
    lower, upper, size, alignment, hint = (np.array(values[key], np.int64) for key in values)
    problem = Problem(lower, upper, size, alignment, gaps if any(gaps) else (), hint if (hint >= 0).any() else None)
    return MappingFile(tuple(c for c in columns if c != "offset"), tuple(rows), problem)


def _check_row(row: dict[str, str], values: dict[str, list[int]], gaps: list[list[Gap]], where: str) -> None:
    """Append the numbers of one row to ``values`` and ``gaps``."""
    for column, default, least in (
        ("lower", None, -_LARGEST),
        ("upper", None, -_LARGEST),
        ("size", None, 0),
        ("alignment", 1, 1),
        ("hint", -1, -1),
    ):
        text = row.get(column, "").strip()
        if not text and default is not None:
            values[column].append(default)
            continue
        if not re.fullmatch(r"[+-]?\d{1,19}", text, re.ASCII):
            raise MappingError(
                f"{column} is {text!r}, which is not a whole number", where=where, remedy="give a whole number"
            )
        number = int(text)
        if not least <= number <= _LARGEST:
            raise MappingError(
                f"{column} is {number}, not between {least} and 2^60", where=where, remedy="correct the value"
            )
        values[column].append(number)
    lower, upper, size = values["lower"][-1], values["upper"][-1], values["size"][-1]
    if lower >= upper:
        raise MappingError(
            f"the lifetime [{lower}, {upper}) is empty", where=where, remedy="upper is the time after the last use"
        )
    found: list[Gap] = []
    for word in row.get("gaps", "").split():
        match = _GAP.match(word)
        if not match:
            raise MappingError(
                f"gap {word!r} is not understood", where=where, remedy="write begin-end or begin-end@low:high"
            )
        begin, end, low, high = (int(group or 0) for group in match.groups())
        if not (lower <= begin <= end <= upper and 0 <= low <= high <= size):
            raise MappingError(
                f"gap {word!r} is not within the buffer", where=where, remedy="gaps lie in its life and size"
            )
        found.append((begin, end, low, high))
    found.sort()
    if any(one[1] > other[0] for one, other in itertools.pairwise(found)):
        raise MappingError("two gaps overlap", where=where, remedy="join them")
    gaps.append(found)


def write(columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    """Rows as CSV text: ``columns`` in order, then ``offset``."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, [*columns, "offset"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
