"""Independent check of memory maps, such as a solver's: it shares no code with what makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import PlanError
from .overlaps import Piece, overlaps

_SHOWN = 10


def validate_mapping(rows: Sequence[Mapping[str, str]], capacity: int | None = None) -> None:
    """Check a solved memory map as read by ``csv.DictReader``: columns id, lower, upper, size, offset and, where there,
    alignment and gaps (``3-7`` free, or ``3-7@0:128`` only the first 128 bytes in use), all half-open.

    Raises:
        PlanError: naming the rows that are wrong.
    """
    found: list[str] = []
    pieces: list[Piece] = []
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        name = row.get("id") or ""
        if name in seen:
            found.append(f"line {number}: id {name!r} is used twice")
        seen.add(name)
        try:
            lower, upper, size, offset = (int(row[column]) for column in ("lower", "upper", "size", "offset"))
            alignment = int(row.get("alignment") or 1)
            gaps = _gaps(row.get("gaps") or "", size)
        except KeyError as error:
            found.append(f"line {number}: there is no column {error}")
            continue
        except (TypeError, ValueError) as error:  # a short row has None in its last columns
            found.append(f"line {number}: {error}")
            continue
        if offset < 0 or (alignment > 1 and offset % alignment):
            found.append(f"line {number}: buffer {name!r} has offset {offset} with alignment {alignment}")
        if capacity is not None and offset + size > capacity:
            found.append(f"line {number}: buffer {name!r} ends at {offset + size}, above the capacity of {capacity}")
        time = lower
        for begin, end, low, high in [*gaps, (upper, upper, 0, 0)]:
            pieces.append(Piece(time, begin, offset, offset + size, name))
            pieces.append(Piece(begin, end, offset + low, offset + high, name))
            time = end
    for first, second, time in overlaps(pieces):
        found.append(f"buffers {first!r} and {second!r} overlap at time {time}")
    if found:
        more = f"\n  ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise PlanError("the memory map is wrong:\n" + "\n".join(f"  - {line}" for line in found[:_SHOWN]) + more)


def _gaps(text: str, size: int) -> list[tuple[int, int, int, int]]:
    """Gaps in order of time: begin, end, and the part of the buffer that stays in use (empty unless given)."""
    gaps = []
    for word in text.split():
        lifetime, _, window = word.partition("@")
        begin, _, end = lifetime.partition("-")
        low, _, high = window.partition(":") if window else ("0", "", "0")
        gaps.append((int(begin), int(end), int(low), int(high)))
    if any(not (begin <= end and 0 <= low <= high <= size) for begin, end, low, high in gaps):
        raise ValueError(f"gap out of range in {text!r}")
    return sorted(gaps)
