"""Devices as data: peak rates, bandwidths, latencies, memory tiers and links, each figure with its source.

A device is one JSON file in ``devices/``. Rates are operations a second (dense, a fused multiply-add counts as two),
bandwidths bytes a second in one direction, sizes bytes, latencies seconds.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from pathlib import Path

import msgspec

from ..errors import DeviceError

FOLDER = Path(__file__).parent / "devices"


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number and where it comes from (a datasheet, a paper, a measurement, or an assumption that says so)."""

    value: float
    source: str


class Tier(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A memory that the plan may place buffers in. ``bandwidth`` is what the compute units reach when they use it
    (scratchpad, device) or what a copy to and from the device reaches (host, disk); ``latency`` is per access or copy.
    """

    capacity: Figure
    bandwidth: Figure
    latency: Figure
    #: Offsets of buffers are multiples of this.
    alignment: int = 64


class Cache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cache that hardware manages: traffic of a working set that fits goes at ``bandwidth``."""

    name: str
    bytes: Figure
    bandwidth: Figure


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A connection between devices in the alpha-beta model: a message of n bytes takes ``latency + n / bandwidth``.

    ``scope`` is ``node`` (NVLink and its like) or ``cluster`` (network between nodes); ``devices`` is how many devices
    one such domain connects; ``bandwidth`` is per device, one direction.
    """

    name: str
    scope: str
    devices: int
    bandwidth: Figure
    latency: Figure


class GemmMeasurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured speed of one library on one matrix product (m, k) @ (k, n). ``layout`` is forward (x @ w.t()),
    input_gradient (dy @ w) or weight_gradient (dy.t() @ x)."""

    library: str
    dtype: str
    layout: str
    m: int
    k: int
    n: int
    rate: float
    #: Products of that size in one call.
    batch: int = 1

    @property
    def flop(self) -> float:
        return 2.0 * self.batch * self.m * self.k * self.n


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the cost model knows about a device."""

    name: str
    title: str
    kind: str
    #: dtype (short name, or ``tf32``) -> dense peak rate of matrix products.
    matrix: dict[str, Figure]
    #: dtype -> peak rate of the vector units, for pointwise work and reductions.
    vector: dict[str, Figure]
    tiers: dict[str, Tier]
    caches: tuple[Cache, ...] = ()
    #: Streaming multiprocessors, compute units or cores.
    units: Figure
    #: Shared memory or local scratch of one unit, bytes.
    unit_scratch: Figure
    launch: Figure
    links: tuple[Link, ...] = ()
    #: Class of kernel -> fraction of the roofline that good libraries reach; ``calibrate`` replaces them.
    efficiency: dict[str, Figure]
    gemm: tuple[GemmMeasurement, ...] = ()
    #: The library that runs f32 products; empty: whichever is faster (the option ``gemm`` fixes one).
    library: str = ""
    #: Bandwidth of kernels by the bytes that they move, values read a few kernels after they were made (calibrated).
    ladder: tuple[Cache, ...] = ()
    #: Op -> seconds that it adds to a generated kernel for each element (calibrated; see ``op_additions.py``).
    added: dict[str, Figure] = {}
    #: Call of a library's op, where it is not the launch of a kernel; of a compiled graph, forward or backward; and
    #: what a training step's two graphs spend on each parameter.
    library_call: Figure | None = None
    graph_call: Figure | None = None
    parameter_call: Figure | None = None
    #: Seconds a byte that large buffers cost because the system clears their pages, each time anew.
    fresh: Figure | None = None
    #: Threads that a CPU's kernels use; 0: one a unit.
    threads: int = 0
    #: f32 elements of a vector in code generated for a calibrated CPU.
    vector_lanes: int = 16
    #: Identity of the machine a calibrated device was measured on; empty for a data file.
    machine: str = ""

    @property
    def memory(self) -> int:
        """Capacity of the device tier in bytes."""
        return int(self.tiers["device"].capacity.value)

    @property
    def bandwidth(self) -> float:
        """Peak bandwidth of the device tier, bytes a second."""
        return self.tiers["device"].bandwidth.value

    @property
    def alignment(self) -> int:
        return self.tiers["device"].alignment

    @property
    def thread_count(self) -> int:
        return self.threads or int(self.units.value)

    def matrix_rate(self, dtype: str) -> float:
        """Peak rate of a matrix product on ``dtype``; dtypes without matrix units fall back on the vector units."""
        figure = self.matrix.get(dtype)
        return figure.value if figure is not None else self.vector_rate(dtype)

    def vector_rate(self, dtype: str) -> float:
        """Peak rate of pointwise work on ``dtype``; unlisted dtypes run at f32's rate."""
        figure = self.vector.get(dtype)
        if figure is None:
            figure = self.vector["f32"]
        return figure.value

    def efficiency_of(self, kind: str) -> float:
        """Fraction of the roofline that kernels of a class reach; a generated cascade is as attention where the file
        says nothing of it."""
        figure = self.efficiency.get(kind) or (self.efficiency.get("attention") if kind == "cascade" else None)
        return figure.value if figure is not None else 1.0

    def link(self, scope: str) -> Link:
        """The link between devices of one node or between nodes; raises DeviceError where the device has none."""
        for link in self.links:
            if link.scope == scope:
                return link
        raise DeviceError(
            f"device {self.name!r} has no link of scope {scope!r}",
            remedy=f"add one to the device file's links (it has {[link.scope for link in self.links]})",
        )


def list_devices() -> tuple[str, ...]:
    """Names of the devices that come with the package, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def load_device(name_or_path: str | Path) -> Device:
    """The device of that name, or the one a JSON file of the same form describes.

    A string that names no packaged device is taken for a path when it has a folder or ends in ``.json``. Raises
    DeviceError for an unknown name (with close ones), a missing file, or a file that is not a device.
    """
    text = str(name_or_path)
    key = text.lower()
    if key in list_devices():
        return _read(FOLDER / f"{key}.json")
    if text.endswith(".json") or "/" in text or "\\" in text:
        path = Path(text)
        if not path.is_file():
            raise DeviceError(f"device file {text!r} does not exist", remedy="give a name or the path of a JSON file")
        return parse_device(path.read_bytes(), where=text)
    close = difflib.get_close_matches(key, list_devices(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise DeviceError(f"unknown device {text!r}", remedy=f"{hint}known devices: {', '.join(list_devices())}")


def device_titled(title: str) -> str | None:
    """The packaged device that a driver calls by ``title`` (``NVIDIA H100 80GB HBM3``), None for an unknown one."""
    words = re.split(r"[^a-z0-9]+", title.lower())
    known = {*words, *map("".join, itertools.pairwise(words))}
    return next((name for name in list_devices() if name.split("-")[0] in known), None)


@functools.cache
def _read(path: Path) -> Device:
    return parse_device(path.read_bytes(), where=str(path))


def parse_device(data: bytes, where: str = "") -> Device:
    """Decode and check a device file; raises DeviceError naming the field that is wrong."""
    try:
        device = msgspec.json.decode(data, type=Device)
    except msgspec.DecodeError as error:
        raise DeviceError(
            f"not a device file: {error}", where=where, remedy="compare with cost_model/devices/h100.json"
        ) from error
    problems = [f"tier {tier!r} is missing" for tier in ("device", "host", "disk") if tier not in device.tiers]
    problems += ["vector rate of f32 is missing"] * ("f32" not in device.vector)
    problems += [f"{label} is not positive" for label, figure in figures(device) if not figure.value > 0]
    if problems:
        raise DeviceError(f"not a device file: {'; '.join(problems)}", where=where, remedy="add what is missing")
    return device


def figures(device: Device) -> list[tuple[str, Figure]]:
    """Every figure of a device with its dotted name, in file order."""
    found: list[tuple[str, Figure]] = []
    found += [(f"matrix.{dtype}", figure) for dtype, figure in device.matrix.items()]
    found += [(f"vector.{dtype}", figure) for dtype, figure in device.vector.items()]
    for name, tier in device.tiers.items():
        found += [(f"tiers.{name}.{part}", getattr(tier, part)) for part in ("capacity", "bandwidth", "latency")]
    for cache in device.caches:
        found += [(f"caches.{cache.name}.bytes", cache.bytes), (f"caches.{cache.name}.bandwidth", cache.bandwidth)]
    for rung in device.ladder:
        found += [(f"ladder.{rung.name}.bandwidth", rung.bandwidth)]
    found += [(f"added.{name}", figure) for name, figure in device.added.items()]
    for name in ("library_call", "graph_call", "parameter_call", "fresh"):
        figure = getattr(device, name)
        if figure is not None:
            found.append((name, figure))
    found += [("units", device.units), ("unit_scratch", device.unit_scratch), ("launch", device.launch)]
    for link in device.links:
        found += [(f"links.{link.name}.bandwidth", link.bandwidth), (f"links.{link.name}.latency", link.latency)]
    found += [(f"efficiency.{kind}", figure) for kind, figure in device.efficiency.items()]
    return found
