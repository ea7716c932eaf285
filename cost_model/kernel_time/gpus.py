"""GPUs as the kernel-time model sees them: published figures, no names.

``gpus.json`` holds the figures (clocks, units, caches, board power) with their sources. A device file of any of three
forms describes others: an entry of ``gpus.json``, the published-figures form of kernel data sets (``Device, Mem_Bw,
Num_Sm, Core_Per_SM, Freq, SingleFLOPs, L2Cache, Dev_Mem``), or a device file of ``cost_model/devices``. Figures that a
file leaves out come from the packaged entry of that name or of the same figures, else from the class of device.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec

from ...errors import DeviceError

FIGURES = Path(__file__).parent / "gpus.json"


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Published figures of one GPU.

    ``units`` streaming multiprocessors, each with ``lanes`` f32 lanes under ``schedulers`` schedulers that issue
    ``issue`` instructions a cycle; ``threads`` resident threads a unit, ``l1_kb`` its first-level cache for global
    loads. Clocks in MHz, bandwidth in GB/s (1e9), caches in MiB or KiB, board power in W, the silicon's feature size as
    marketed in nm.
    """

    title: str
    units: float
    lanes: float
    boost_mhz: float
    bandwidth_gbs: float
    l2_mb: float
    memory_gb: float = 0.0
    capability: float = 8.0
    schedulers: float = 4
    issue: float = 1
    base_mhz: float = 0.0
    memory_kind: str = "hbm"
    l2_partitions: float = 1
    threads: float = 2048
    scratch_kb: float = 96
    l1_kb: float = 128
    power_w: float = 0.0
    process_nm: float = 0.0
    aliases: tuple[str, ...] = ()
    source: str = ""

    @property
    def peak(self) -> float:
        """f32 operations a second at the boost clock; a fused multiply-add counts as two."""
        return 2.0 * self.units * self.lanes * self.boost_mhz * 1e6

    @property
    def bandwidth(self) -> float:
        """Bytes a second of device memory, as published."""
        return self.bandwidth_gbs * 1e9

    @property
    def l2(self) -> float:
        """Bytes of the last-level cache."""
        return self.l2_mb * 2**20

    @property
    def watts(self) -> float:
        """Board power for each 1e12 f32 operations a second at the boost clock; 0 where the power is not known."""
        return self.power_w / (self.peak / 1e12)

    @property
    def lanes_to_issue(self) -> float:
        """f32 lanes over lanes' worth of instructions issued a cycle; at 1, every issued instruction must be an FMA."""
        return self.lanes / (32.0 * self.schedulers * self.issue)


#: The figures that a file may bring and their names in the kernel data sets' form.
_DATA_SET_NAMES = {
    "Device": "title",
    "Mem_Bw": "bandwidth_gbs",
    "Num_Sm": "units",
    "Core_Per_SM": "lanes",
    "Freq": "boost_mhz",
    "L2Cache": "l2_mb",
    "Dev_Mem": "memory_gb",
}
#: File figures within this of the packaged ones are taken for the same figure, differently rounded.
_SAME = 0.05


@functools.cache
def packaged() -> dict[str, Gpu]:
    """The GPUs that come with the package, by short name."""
    return msgspec.json.decode(FIGURES.read_bytes(), type=dict[str, Gpu])


def find(name: str, given: dict[str, Gpu] | None = None) -> Gpu:
    """The GPU of that name: of the ``given`` ones first, then of the packaged ones.

    Raises DeviceError for an unknown name, with close ones.
    """
    for table in (given or {}, _by_name()):
        found = table.get(key(name))
        if found is not None:
            return found
    titles = {key(gpu.title): gpu.title for gpu in packaged().values()}
    close = difflib.get_close_matches(key(name), titles, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(titles[each]) for each in close)}? " if close else ""
    raise DeviceError(
        f"no figures for the device {name!r}",
        remedy=f"{hint}--device-file describes one; known: {', '.join(sorted(titles.values()))}",
    )


@functools.cache
def _by_name() -> dict[str, Gpu]:
    table = {}
    for short, gpu in packaged().items():
        for name in (short, gpu.title, *gpu.aliases):
            table[key(name)] = gpu
    return table


def key(name: str) -> str:
    """``NVIDIA_A100-PCIE-40GB`` and ``NVIDIA A100 PCIe 40GB`` are one device."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word not in ("nvidia", "tesla", "geforce", "")]
    return "".join(words)


def read_device_file(path: Path, text: str) -> dict[str, Gpu]:
    """The GPUs that a device file describes, by the key that ``find`` looks up. Raises DeviceError."""
    where = str(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DeviceError(f"not JSON: {error}", where=where, remedy="see docs/cost_model.md for the forms") from error
    if not isinstance(value, dict):
        raise DeviceError("a device file holds one JSON object", where=where, remedy="see docs/cost_model.md")
    entries: dict[str, Any] = value
    single = any(field in value for field in ("Device", "Num_Sm", "units", "tiers", "title"))
    if single:
        entries = {str(value.get("Device") or value.get("title") or path.stem): value}
    found: dict[str, Gpu] = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise DeviceError(f"{name!r} is not an object of figures", where=where, remedy="see docs/cost_model.md")
        gpu = _gpu(name, entry, where)
        for alias in {name, gpu.title, *gpu.aliases, *([str(entry["name"])] if "name" in entry else [])}:
            found[key(alias)] = gpu
    if not found:
        raise DeviceError("the device file describes no device", where=where, remedy="see docs/cost_model.md")
    return found


def _gpu(name: str, entry: dict[str, Any], where: str) -> Gpu:
    if "tiers" in entry:
        figures = _from_effcc_device(entry, where)
    elif "Num_Sm" in entry or "Mem_Bw" in entry:
        figures = {ours: entry[theirs] for theirs, ours in _DATA_SET_NAMES.items() if theirs in entry}
        figures.setdefault("title", name)
        if "SingleFLOPs" in entry and {"units", "boost_mhz"} <= set(figures) and "lanes" not in figures:
            figures["lanes"] = float(entry["SingleFLOPs"]) * 1e3 / (2 * figures["units"] * figures["boost_mhz"])
    else:
        figures = dict(entry)
        figures.setdefault("title", name)
    names = (str(figures["title"]), name, str(entry.get("name", "")))
    known = next((_by_name()[key(each)] for each in names if key(each) in _by_name()), None) or _alike(figures)
    merged = _with_defaults(figures, known)
    try:
        gpu = msgspec.convert(merged, type=Gpu)
    except msgspec.ValidationError as error:
        raise DeviceError(
            f"not figures of a GPU ({name!r}): {error}", where=where, remedy="see docs/cost_model.md for the forms"
        ) from error
    for field in ("units", "lanes", "boost_mhz", "bandwidth_gbs", "l2_mb", "threads", "schedulers", "issue"):
        figure = getattr(gpu, field)
        if not (math.isfinite(figure) and figure > 0):
            raise DeviceError(f"{field} of {name!r} is not a positive number", where=where, remedy="correct the figure")
    return gpu


def _alike(figures: dict[str, Any]) -> Gpu | None:
    """The packaged GPU that has these figures under another name; the first of several that share them."""

    def agrees(gpu: Gpu) -> bool:
        lanes = _number(figures.get("units"), 0.0) * _number(figures.get("lanes"), 0.0)
        same = [_same(figures.get(field), getattr(gpu, field)) for field in ("bandwidth_gbs", "boost_mhz", "l2_mb")]
        return all(same) and _same(lanes, gpu.units * gpu.lanes)

    found = next((gpu for gpu in packaged().values() if agrees(gpu)), None)
    return None if found is None else msgspec.structs.replace(found, aliases=())


def _with_defaults(figures: dict[str, Any], known: Gpu | None) -> dict[str, Any]:
    """A file's figures over the packaged ones, or over those of the class that the figures point to."""
    if known is not None:
        base = msgspec.to_builtins(known)
        fresh = {field: value for field, value in figures.items() if not _same(value, base.get(field))}
        total = _number(figures.get("units"), known.units) * _number(figures.get("lanes"), known.lanes)
        if _same(total, known.units * known.lanes):  # some sources split one unit into two
            fresh.pop("units", None)
            fresh.pop("lanes", None)
        return {**base, **fresh, "title": figures["title"]}
    lanes = _number(figures.get("lanes"), 128.0)
    l2 = _number(figures.get("l2_mb"), 0.0)
    hbm = _number(figures.get("bandwidth_gbs"), 0.0) >= 700 and _number(figures.get("memory_gb"), 80.0) not in (24, 48)
    guessed = {
        "memory_kind": "hbm" if hbm else "gddr",
        "l2_partitions": 2 if hbm and l2 >= 20 else 1,
        "threads": 2048 if hbm else 1536 if lanes >= 128 else 1024,
        "scratch_kb": 164 if hbm else 100,
        "l1_kb": 192 if hbm else 128,
    }
    return {**guessed, **figures}


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= _SAME * abs(other)
    return bool(one == other)


def _from_effcc_device(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """Figures of a device file of ``cost_model/devices``; clocks are not in it, so the lanes' rate is kept instead."""
    from ..devices import parse_device

    device = parse_device(json.dumps(entry).encode(), where)
    if device.kind != "cuda":
        raise DeviceError(
            f"kernel times are modelled for CUDA devices, {device.name!r} is {device.kind!r}",
            where=where,
            remedy="give the figures of a CUDA device",
        )
    units = device.units.value
    rate = device.vector_rate("f32")
    last = max(device.caches, key=lambda cache: cache.bytes.value, default=None)
    lanes = 128.0 if rate / (2 * units * 128) > 1.2e9 else 64.0
    return {
        "title": device.title,
        "units": units,
        "lanes": lanes,
        "boost_mhz": rate / (2 * units * lanes) / 1e6,
        "bandwidth_gbs": device.bandwidth / 1e9,
        "l2_mb": last.bytes.value / 2**20 if last is not None else 4.0,
        "memory_gb": device.memory / 2**30,
        "scratch_kb": device.unit_scratch.value / 1024,
    }
