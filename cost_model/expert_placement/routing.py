"""Routing traces and load matrices, read and counted.

A trace says which experts each token met: CSV with the header ``token,layer,slot,expert`` (slot 0 to k - 1 of a top-k
router), or an npz file with these four arrays (or ``experts`` alone, [tokens, layers, k]) and, if wanted,
``expert_count``. A load matrix is a CSV file without a header: a row a layer, a column an expert.

Counting is exact, and it is all that placement needs: its objective is linear in how many tokens were at expert i of a
layer and at expert j of the next, so that nothing depends on the number of tokens afterwards.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import PlacementError
from .problem import Floats, Ints

COLUMNS = ("token", "layer", "slot", "expert")
#: Most entries of the transition counts (8 bytes each).
_LARGEST = 1 << 28
_FORMATS = "a trace (CSV with the header token,layer,slot,expert, or npz) or a load matrix (CSV without a header)"


@dataclass(frozen=True)
class Routing:
    """``loads``: [layers, experts] tokens; ``transitions``: [layers - 1, experts, experts], zero for a load matrix;
    ``layers``: the numbers that the file gives them; ``tokens``: 0 for a load matrix."""

    loads: Floats
    transitions: Floats
    layers: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Trace:
    """Rows of a trace, each array of the same length; tokens are numbered in order of time."""

    token: Ints
    layer: Ints
    slot: Ints
    expert: Ints
    expert_count: int = 0


def read_routing(path: Path, experts: int | None = None, window: int | None = None) -> Routing:
    """Read and count a file. ``experts``: their number, where the largest id in the file is not the last; ``window``:
    count the last so many tokens of a trace only.

    Raises:
        PlacementError: the file cannot be read or is malformed; names line and column.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PlacementError(f"cannot read {path}: {error.strerror}", remedy=f"give {_FORMATS}") from error
    if raw[:4] == b"PK\x03\x04":
        return count(_read_npz(raw, str(path)), experts, window, str(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlacementError(
            f"{path} is neither text nor npz", where=f"byte {error.start}", remedy=f"give {_FORMATS}"
        ) from error
    first = text.lstrip().split("\n", 1)[0]
    if any(character.isalpha() for character in first.lower().replace("e", "").replace("nan", "").replace("inf", "")):
        return count(_read_trace(text, str(path)), experts, window, str(path))
    return _load_matrix(text, str(path), experts)


def count(trace: Trace, experts: int | None = None, window: int | None = None, name: str = "the trace") -> Routing:
    """Exact loads and transition counts: every pair of an expert of a token at a layer and one at the next layer that
    the trace has. Raises PlacementError."""
    token, layer, expert = trace.token, trace.layer, trace.expert
    if token.size == 0:
        raise PlacementError("there is no row", where=name, remedy="a trace has a row for each token, layer and slot")
    if min(token.min(), layer.min(), trace.slot.min(), expert.min()) < 0:
        raise PlacementError("a number is negative", where=name, remedy="tokens, layers, slots, experts begin at 0")
    found = int(expert.max()) + 1
    given = experts if experts is not None else trace.expert_count or found
    if found > given:
        raise PlacementError(f"expert {found - 1} is not one of {given}", where=name, remedy="correct --experts")
    order = np.lexsort((trace.slot, token, layer))
    token, layer, slot, expert = token[order], layer[order], trace.slot[order], expert[order]
    same = (np.diff(token) == 0) & (np.diff(layer) == 0) & (np.diff(slot) == 0)
    if same.any():
        at = int(np.flatnonzero(same)[0])
        raise PlacementError(
            f"token {token[at]} has two rows for layer {layer[at]}, slot {slot[at]}", where=name, remedy="give one"
        )
    if window is not None:
        kept = token >= np.unique(token)[-window:][0]
        token, layer, expert = token[kept], layer[kept], expert[kept]
    numbers, starts = np.unique(layer, return_index=True)
    if numbers.size * given * given > _LARGEST:
        raise PlacementError(
            f"{numbers.size} layers of {given} experts are too many", where=name, remedy="see whether ids are experts"
        )
    ends = np.append(starts[1:], layer.size)
    parts = [(token[a:b], expert[a:b]) for a, b in zip(starts, ends, strict=True)]
    loads = np.stack([np.bincount(chosen, minlength=given) for _, chosen in parts]).astype(np.float64)
    transitions = np.zeros((len(parts) - 1, given, given))
    for index in range(len(parts) - 1):
        transitions[index] = _pairs(*parts[index], *parts[index + 1], given)
    return Routing(loads, transitions, tuple(numbers.tolist()), int(np.unique(token).size))


def _pairs(before: Ints, left: Ints, after: Ints, right: Ints, experts: int) -> Floats:
    """Count (left, right) over all pairs of rows with equal tokens; both token arrays are sorted."""
    first = np.searchsorted(after, before, side="left")
    number = np.searchsorted(after, before, side="right") - first
    which = np.repeat(first, number) + np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    codes = np.repeat(left, number) * experts + right[which]
    return np.bincount(codes, minlength=experts * experts).reshape(experts, experts).astype(np.float64)


def _read_trace(text: str, name: str) -> Trace:
    header, _, body = text.lstrip().partition("\n")
    names = [column.strip().lower() for column in header.split(",")]
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise PlacementError(f"column {missing[0]!r} is missing", where=f"{name}, line 1", remedy=f"give {_FORMATS}")
    if not body.strip():
        raise PlacementError("there is no row", where=name, remedy="a trace has a row for each token, layer and slot")
    try:
        rows = np.loadtxt(
            io.StringIO(body), dtype=np.int64, delimiter=",", ndmin=2, comments=None,
            usecols=[names.index(column) for column in COLUMNS],
        )  # fmt: skip
    except ValueError:
        raise _first_fault(body, names, name) from None
    token, layer, slot, expert = (np.ascontiguousarray(column) for column in rows.T)
    return Trace(token, layer, slot, expert)


def _first_fault(body: str, names: Sequence[str], name: str) -> PlacementError:
    """The first line that is no row of whole numbers."""
    for number, line in enumerate(body.split("\n"), start=2):
        if not line.strip():
            continue
        fields = line.split(",")
        if len(fields) < len(names):
            return PlacementError(
                f"the line has {len(fields)} fields, not {len(names)}", where=f"{name}, line {number}",
                remedy="give one value a column",
            )  # fmt: skip
        for column in COLUMNS:
            value = fields[names.index(column)].strip()
            if not value.lstrip("+-").isdigit() or len(value) > 18:
                return PlacementError(
                    f"{column} is {value!r}, which is not a whole number", where=f"{name}, line {number}",
                    remedy="give a whole number",
                )  # fmt: skip
    return PlacementError("the rows are not read", where=name, remedy=f"give {_FORMATS}")


def _read_npz(raw: bytes, name: str) -> Trace:
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for key in file.files if key in (*COLUMNS, "experts", "expert_count")}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise PlacementError(f"the npz file is damaged: {error}", where=name, remedy=f"give {_FORMATS}") from error
    for key, array in arrays.items():
        if not np.issubdtype(array.dtype, np.integer):
            raise PlacementError(f"{key} is {array.dtype}, not integers", where=name, remedy="give whole numbers")
    expert_count = int(arrays["expert_count"]) if "expert_count" in arrays and arrays["expert_count"].size == 1 else 0
    if all(column in arrays for column in COLUMNS):
        columns = [arrays[column].astype(np.int64).ravel() for column in COLUMNS]
        if len({column.size for column in columns}) > 1:
            raise PlacementError("the arrays differ in length", where=name, remedy="give one value a row in each")
        return Trace(columns[0], columns[1], columns[2], columns[3], expert_count)
    if "experts" in arrays and arrays["experts"].ndim == 3:
        return from_choices(arrays["experts"], expert_count)
    raise PlacementError(
        "the npz file has no trace", where=name,
        remedy="it holds token, layer, slot and expert of equal length, or experts [tokens, layers, k]",
    )  # fmt: skip


def from_choices(choices: Ints, expert_count: int = 0) -> Trace:
    """The trace of an array [tokens, layers, k] of experts."""
    token, layer, slot = (index.ravel().astype(np.int64) for index in np.indices(choices.shape))
    return Trace(token, layer, slot, choices.astype(np.int64).ravel(), expert_count)


def write_trace(trace: Trace, path: Path) -> bytes:
    """The bytes of a trace file: CSV, or npz where the path says so."""
    columns = [getattr(trace, column) for column in COLUMNS]
    if path.suffix == ".npz":
        out = io.BytesIO()
        np.savez_compressed(out, expert_count=np.int64(trace.expert_count), **dict(zip(COLUMNS, columns, strict=True)))
        return out.getvalue()
    text = io.StringIO()
    text.write(",".join(COLUMNS) + "\n")
    np.savetxt(text, np.stack(columns, axis=1), fmt="%d", delimiter=",")
    return text.getvalue().encode()


def _load_matrix(text: str, name: str, experts: int | None) -> Routing:
    rows: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = [float(field) for field in line.split(",")]
        except ValueError as error:
            raise PlacementError(str(error), where=where, remedy="give the load of each expert as a number") from None
        if not all(0 <= value < 1e15 for value in row):
            raise PlacementError("a load is not between 0 and 1e15", where=where, remedy="give tokens of each expert")
        if rows and len(row) != len(rows[0]):
            raise PlacementError(
                f"the line has {len(row)} loads, not {len(rows[0])}", where=where, remedy="give one for each expert"
            )
        rows.append(row)
    if not rows:
        raise PlacementError("the file is empty", where=name, remedy=f"give {_FORMATS}")
    loads = np.array(rows, np.float64)
    if experts is not None and experts != loads.shape[1]:
        raise PlacementError(
            f"the file has {loads.shape[1]} experts, not {experts}", where=name, remedy="correct --experts"
        )
    layers, number_of = loads.shape
    if layers * number_of * number_of > _LARGEST:
        raise PlacementError(f"{layers} layers of {number_of} experts are too many", where=name, remedy="give fewer")
    return Routing(loads, np.zeros((layers - 1, number_of, number_of)), tuple(range(layers)), 0)
