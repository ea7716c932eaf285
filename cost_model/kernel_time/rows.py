"""Kernel rows: what a CSV of kernels asks for, and how ops group into families.

Columns are those of the kernel data sets: ``OPName, Device`` and sizes, ``B, M, N, K`` for matrix products ((B, M, N) @
(B, N, K), so N is the depth) and ``B, H`` (rows, width) for the others. ``Latency`` (milliseconds) is read only from
measured rows. A column that says the element type must say f32. Whatever else profiling gave (kernel name, grid, block)
is carried along and never read.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import KernelDataError

Array = npt.NDArray[np.float64]

#: Family -> op names it covers. An op's cost within a family depends on its sizes and its count of full-size operands.
FAMILIES: dict[str, tuple[str, ...]] = {
    "bmm": ("bmm", "matmul", "baddbmm"),
    "linear": ("linear", "mm", "addmm", "gemm"),
    "softmax": ("softmax", "log_softmax"),
    "norm": ("ln", "layernorm", "layer_norm", "native_layer_norm", "rms_norm", "rmsnorm"),
    "pointwise": (),
}
GEMM_FAMILIES = ("bmm", "linear")
#: Pointwise ops of two full-size operands, and of one (``addu`` and its like take a scalar beside the tensor).
_BINARY = "add sub mul div pow maximum minimum where atan2 fmod remainder eq ne lt le gt ge"
_UNARY = (
    "addu subu mulu divu powu relu gelu tanh sigmoid silu exp log sqrt rsqrt neg abs sin cos erf clone copy cast "
    "dropout leaky_relu elu softplus hardtanh hardswish mish reciprocal square floor ceil round sign clamp "
    "tanhu gelutanh"
)
OPERANDS = {**dict.fromkeys(_BINARY.split(), 2), **dict.fromkeys(_UNARY.split(), 1)}
_FAMILY_OF = {name: family for family, names in FAMILIES.items() for name in names} | dict.fromkeys(
    OPERANDS, "pointwise"
)
_SIZES = {"bmm": "BMNK", "linear": "BMNK", "softmax": "BH", "norm": "BH", "pointwise": "BH"}


#: Columns that may say the element type, in small letters, and the types that are modelled.
_TYPE_COLUMNS = ("dtype", "data type", "data_type", "precision")
_F32 = ("", "f32", "fp32", "float32", "float", "torch.float32", "torch.float")


def family_of(op: str) -> str:
    """The family of an op by name; raises KernelDataError for an unknown op."""
    name = op.strip().lower().removeprefix("aten.").removeprefix("aten::")
    family = _FAMILY_OF.get(name)
    if family is None:
        known = ", ".join(sorted(_FAMILY_OF))
        raise KernelDataError(f"no model of the op {op!r}", remedy=f"known ops: {known}")
    return family


def operands_of(op: str) -> int:
    """How many full-size tensors a pointwise op reads."""
    return OPERANDS.get(op.strip().lower().removeprefix("aten.").removeprefix("aten::"), 1)


@dataclass
class Rows:
    """Kernels of one family on one device: sizes (NaN where a family has none), and measured seconds where known."""

    family: str
    device: str
    operands: Array
    sizes: dict[str, Array]
    seconds: Array | None = None
    index: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    #: Recorded kernel names, of training rows only.
    kernels: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.operands)

    def take(self, which: npt.NDArray[Any]) -> Rows:
        """The rows at these positions or where this mask holds."""
        picked = np.flatnonzero(which) if which.dtype == bool else which
        return Rows(
            self.family,
            self.device,
            self.operands[picked],
            {name: values[picked] for name, values in self.sizes.items()},
            None if self.seconds is None else self.seconds[picked],
            self.index[picked],
            [self.kernels[int(i)] for i in picked] if self.kernels else (),
        )


@dataclass
class Table:
    """A CSV of kernels: its header and lines as they came, and the rows in groups of one family and device."""

    header: list[str]
    lines: list[list[str]]
    groups: list[Rows]

    def with_columns(self, columns: Mapping[str, Sequence[str]]) -> str:
        """The CSV with further columns at its end (columns of these names that it had are replaced)."""
        keep = [i for i, name in enumerate(self.header) if name not in columns]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*(self.header[i] for i in keep), *columns])
        for number, line in enumerate(self.lines):
            writer.writerow([*(line[i] for i in keep), *(values[number] for values in columns.values())])
        return out.getvalue()


def parse(text: str, where: str, *, measured: bool = False, kernel_names: bool = False) -> Table:
    """Read a CSV of kernels; ``measured`` demands a Latency column. Raises KernelDataError naming the line."""
    reader = csv.reader(io.StringIO(text))
    try:
        header = [name.strip().lstrip("\ufeff") for name in next(reader, [])]
        lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except csv.Error as error:
        raise KernelDataError(f"not a CSV file: {error}", where=where, remedy="see docs/cost_model.md") from error
    place = {name: i for i, name in enumerate(header)}
    missing = [name for name in ("OPName", "Device", *(["Latency"] if measured else [])) if name not in place]
    if missing:
        raise KernelDataError(
            f"the column {', '.join(missing)} is missing",
            where=where,
            remedy="the first line names the columns: OPName,Device and B,M,N,K or B,H"
            + (" and Latency" if measured else ""),
        )
    if not lines:
        raise KernelDataError("there is no row", where=where, remedy="give one kernel a line below the column names")
    type_columns = [i for i, name in enumerate(header) if name.lower() in _TYPE_COLUMNS]
    collected: dict[tuple[str, str], list[tuple[int, int, list[float], float, str]]] = {}
    families: dict[str, str] = {}
    for number, (line_number, line) in enumerate(lines):
        at = f"{where}, line {line_number}"
        if len(line) != len(header):
            raise KernelDataError(
                f"{len(line)} cells under {len(header)} columns", where=at, remedy="complete the line"
            )
        for column in type_columns:
            if line[column].strip().lower() not in _F32:
                raise KernelDataError(
                    f"the {header[column]} is {line[column]!r}; kernel times are modelled for f32 alone",
                    where=at,
                    remedy="leave such rows out",
                )
        op = line[place["OPName"]]
        if op not in families:
            try:
                families[op] = family_of(op)
            except KernelDataError as error:
                raise KernelDataError(error.message, where=at, remedy=error.remedy) from None
        family = families[op]
        sizes = [_size(line, place, name, at) for name in _SIZES[family]]
        seconds = _positive(line[place["Latency"]], "Latency", at) * 1e-3 if measured else math.nan
        name = line[place["Kernel Name"]] if kernel_names and "Kernel Name" in place else ""
        key = (family, line[place["Device"]].strip())
        collected.setdefault(key, []).append((number, operands_of(op), sizes, seconds, name))
    groups = []
    for (family, device), rows in collected.items():
        sizes_table = np.array([row[2] for row in rows], np.float64)
        groups.append(
            Rows(
                family,
                device,
                np.array([row[1] for row in rows], np.float64),
                {name: sizes_table[:, i] for i, name in enumerate(_SIZES[family])},
                np.array([row[3] for row in rows]) if measured else None,
                np.array([row[0] for row in rows], np.int64),
                [row[4] for row in rows] if kernel_names else (),
            )
        )
    return Table(header, [line for _, line in lines], groups)


def _size(line: list[str], place: dict[str, int], name: str, at: str) -> float:
    if name not in place:
        if name == "B":
            return 1.0
        raise KernelDataError(f"the column {name} is missing, which this op needs", where=at, remedy="add the size")
    if name == "B" and not line[place[name]].strip():
        return 1.0
    return _positive(line[place[name]], name, at, whole=True)


def _positive(text: str, name: str, at: str, *, whole: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0) or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise KernelDataError(f"{name} is {text!r}, not a positive {kind}", where=at, remedy="correct the cell")
    return value


def read(path: Path, *, measured: bool = False, kernel_names: bool = False) -> Table:
    """The table in a CSV file, gzipped or plain. Raises KernelDataError."""
    import gzip
    import zlib

    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-8")
    except OSError as error:
        raise KernelDataError(f"cannot read {path}: {error.strerror or error}", remedy="check the path") from error
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise KernelDataError(
            f"{path} is not a CSV file: {error}", remedy="give a text file, plain or gzipped"
        ) from error
    return parse(text, str(path), measured=measured, kernel_names=kernel_names)
