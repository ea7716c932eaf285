"""Measure this machine's CPU: matrix products by library and layout, memory, call overhead, disk.

The answer is the ``cpu`` device with measured figures, kept as JSON in ``EFFCC_CACHE_DIR`` (default ``~/.cache/effcc``)
under a name made from the machine, its thread count and torch's version. A directory that cannot be written is no
error: the measurement then lasts as long as the process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from ..logs import logger
from .cpu_kernels import bandwidth_ladder, fresh_seconds, library_laws
from .devices import Cache, Device, Figure, GemmMeasurement, Tier, load_device, parse_device
from .generated_probes import GeneratedKernels, Probes, Together, measure_probes, prepare_probes, vector_lanes
from .measuring_time import Account
from .product_probes import DTYPES, batched_products, interleaved, linear_products

#: Part -> share of the seconds. Products get what the others leave of the whole, and no less than their own share.
SHARES = {
    "fresh memory": 0.025,
    "memory": 0.1,
    "generated kernels": 0.15,
    "ladder": 0.05,
    "laws": 0.1,
    "batched": 0.075,
    "products": 0.4,
    "cascades": 0.05,
}
#: Measures the share of the products' rate that generated cascades reach, in about so many seconds.
CascadeShare: TypeAlias = Callable[[Device, float], float]
#: Seconds that writing to disk is measured for, and the bytes that are written at first and at most.
DISK_SECONDS, DISK_BYTES = 1.0, (4 << 20, 64 << 20)


def calibrate(
    seconds: float = 20.0,
    save: bool = True,
    generated: bool = True,
    cascade: Callable[[], Callable[[], CascadeShare | None]] | None = None,
    together: Together | None = None,
    account: Account | None = None,
) -> Device:
    """Measure the CPU for about ``seconds`` and return it; keeps the result for ``calibrated_device`` if ``save``.

    To measure generated kernels too takes a C++ compiler, and as long again as that takes for them; ``together``
    compiles many at once. ``cascade`` begins to compile generated cascades; what it returns waits for them, and gives
    what measures them. All is compiled before anything is measured but fresh memory, so that no compiler runs beside
    what is measured. ``account``, if given, is told what took how long.
    """
    account = account or Account()
    account.budget = seconds
    source = f"measured on {machine()} by effcc calibrate"
    with account.part("fresh memory"):  # before others have freed as much
        fresh = fresh_seconds(SHARES["fresh memory"] * seconds)
    probes, share_of = None, None
    if generated:
        with account.part("generated kernels", compiled=True):
            begun = cascade() if cascade is not None else None
            probes = prepare_probes(together)
            share_of = begun() if begun is not None else None
    with account.part("memory, calls and disk"):
        memory, launch, disk = _memory(SHARES["memory"] * seconds), _launch(), _disk()
    kernels = _kernels(probes, seconds, launch, account) if probes is not None else None
    with account.part("batched products"):
        batched = tuple(batched_products(SHARES["batched"] * seconds))
    with account.part("products"):
        cascades = SHARES["cascades"] * seconds if kernels is not None and share_of is not None else 0.0
        products = tuple(linear_products(max(account.left - cascades, SHARES["products"] * seconds)))
    device = _device((*products, *batched), memory, launch, disk, source)
    if kernels is not None:
        device = _with_kernels(device, kernels, source, fresh)
    if kernels is not None and share_of is not None:
        with account.part("cascades"):
            share = share_of(device, cascades)
        efficiency = dict(device.efficiency) | {"cascade": Figure(value=share, source=source)}
        device = msgspec.structs.replace(device, efficiency=efficiency)
    if save:
        _store(device)
        calibrated_device.cache_clear()
    told = "measured for %.1f s of %.1f s, compiled for %.1f s"
    logger("calibrate").info(told, account.measured, seconds, account.compiled)
    return device


@functools.cache
def calibrated_device() -> Device:
    """This machine's CPU as last calibrated (with this torch and thread count), else the generic ``cpu``."""
    path = _path()
    try:
        return parse_device(path.read_bytes(), where=str(path))
    except OSError:
        return load_device("cpu")


def machine() -> str:
    """This machine in words: processor, usable cores, system, torch."""
    return f"{_processor()}, {_threads()} threads, {platform.system()} {platform.machine()}, torch {_torch_version()}"


@dataclass(frozen=True)
class _Kernels:
    """What generated kernels and library ops reach."""

    generated: GeneratedKernels
    ladder: dict[int, float]
    laws: dict[str, float]


def _kernels(probes: Probes, seconds: float, launch: float, account: Account) -> _Kernels | None:
    with account.part("generated kernels"):
        found = measure_probes(probes, SHARES["generated kernels"] * seconds)
    if found is None:
        return None
    with account.part("memory by size"):
        ladder = bandwidth_ladder(SHARES["ladder"] * seconds, launch)
    with account.part("attention and convolution"):
        laws = library_laws(SHARES["laws"] * seconds, found.library)
    return _Kernels(found, ladder, laws)


def _with_kernels(device: Device, kernels: _Kernels, source: str, fresh: float) -> Device:
    def figure(value: float) -> Figure:
        return Figure(value=value, source=source)

    found = kernels.generated
    added = dict(found.added) | kernels.laws
    return msgspec.structs.replace(
        device,
        added={name: figure(max(value, 1e-15)) for name, value in added.items()},
        launch=figure(found.call),
        library_call=figure(found.library),
        graph_call=figure(max(found.graph, 1e-9)),
        parameter_call=figure(max(found.parameter, 1e-9)),
        fresh=figure(max(fresh, 1e-15)),
        ladder=tuple(
            Cache(name=f"{moved >> 10} KiB", bytes=figure(float(moved)), bandwidth=figure(rate))
            for moved, rate in kernels.ladder.items()
        ),
        vector_lanes=vector_lanes(),
    )


def _memory(seconds: float) -> dict[str, float]:
    """Bytes a second, read and written: ``copy``, ``pointwise`` (two read, one written), ``reduction`` on sizes beyond
    any cache, and ``cache <bytes>`` for a pointwise op whose working set is half of each cache."""
    import torch

    count = 1 << 25  # 128 MiB of f32
    a, b, out = (torch.ones(count) for _ in range(3))
    share = seconds / (3 + len(_cache_sizes()))
    found = {
        "copy": 8 * count / interleaved({"_": lambda: out.copy_(a)}, share)["_"],
        "pointwise": 12 * count / interleaved({"_": lambda: torch.add(a, b, out=out)}, share)["_"],
        "reduction": 4 * count / interleaved({"_": lambda: torch.sum(a)}, share)["_"],
    }
    for _, size in _cache_sizes():
        part = max(1024, size // 2 // 12)
        x, y, z = a[:part], b[:part], out[:part]
        run = functools.partial(torch.add, x, y, out=z)
        overhead = _launch()
        spent = max(interleaved({"_": run}, share)["_"] - overhead, 1e-7)
        found[f"cache {size}"] = 12 * part / spent
    return found


@functools.cache
def _launch() -> float:
    """Seconds of a call that does next to nothing."""
    import torch

    x = torch.ones(1)
    with torch.no_grad():
        return min(_many(lambda: torch.add(x, x, out=x)) for _ in range(5))


def _many(run: Callable[[], Any], times: int = 2000) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - begin) / times


def _disk() -> float | None:
    """Bytes a second of writing a file through to the disk that holds temporary files; None where that fails."""
    first, most = DISK_BYTES
    try:
        rate = _written(first)
        return _written(max(first, min(most, int(rate * DISK_SECONDS))))
    except OSError:
        return None


def _written(size: int) -> float:
    """Bytes a second of writing ``size`` bytes, whole MiB. Raises OSError."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile() as file:
        begin = time.perf_counter()
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return (size >> 20 << 20) / (time.perf_counter() - begin)


def _device(
    gemm: tuple[GemmMeasurement, ...], memory: dict[str, float], launch: float, disk: float | None, source: str
) -> Device:
    generic = load_device("cpu")

    def figure(value: float) -> Figure:
        return Figure(value=value, source=source)

    peak = max(memory["copy"], memory["pointwise"], memory["reduction"])
    capacity = figure(float(_total_memory() or generic.memory))
    tiers = dict(generic.tiers)
    changed = msgspec.structs.replace
    tiers["device"] = changed(generic.tiers["device"], capacity=capacity, bandwidth=figure(peak))
    tiers["host"] = changed(generic.tiers["host"], capacity=capacity, bandwidth=figure(memory["copy"] / 2))
    if disk is not None:
        tiers["disk"] = Tier(
            capacity=generic.tiers["disk"].capacity,
            bandwidth=figure(disk),
            latency=generic.tiers["disk"].latency,
            alignment=generic.tiers["disk"].alignment,
        )
    matrix = dict(generic.matrix)
    for dtype in DTYPES:
        rates = [entry.rate for entry in gemm if entry.dtype == dtype]
        if rates:
            matrix[dtype] = figure(max(rates))
    caches = tuple(
        Cache(name=name, bytes=figure(float(size)), bandwidth=figure(memory[f"cache {size}"]))
        for name, size in _cache_sizes()
    )
    measured = {"memory": memory["pointwise"] / peak, "reduction": memory["reduction"] / peak, "gemm": 1.0}
    efficiency = dict(generic.efficiency) | {kind: figure(value) for kind, value in measured.items()}
    return changed(
        generic,
        title=f"{_processor()} (calibrated)",
        matrix=matrix,
        tiers=tiers,
        caches=caches or generic.caches,
        units=figure(float(_threads())),
        launch=figure(launch),
        efficiency=efficiency,
        gemm=gemm,
        threads=_threads(),
        machine=machine(),
    )


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@functools.cache
def _cache_sizes() -> tuple[tuple[str, int], ...]:
    """(name, bytes) of the caches of level 2 and up that the usable cores have together, from Linux's sysfs."""
    found: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level = int((folder / "level").read_text())
            text = (folder / "size").read_text().strip()
            shared = (folder / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        if level < 2 or not text.endswith("K") or not text[:-1].isdecimal():
            continue
        copies = max(1, _threads() // _count(shared))
        found[f"L{level}"] = int(text[:-1]) * 1024 * copies
    return tuple(found.items())


def _count(text: str) -> int:
    """How many processors a list such as ``0-3,8`` names."""
    total = 0
    for part in text.split(","):
        low, _, high = part.partition("-")
        total += int(high) - int(low) + 1 if high else 1
    return total


@functools.cache
def _threads() -> int:
    """Threads torch will use by default: OMP_NUM_THREADS, else the cores this process may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _torch_version() -> str:
    return importlib.metadata.version("torch")


def calibration_folder() -> Path:
    """Where this machine's measurements are kept."""
    return Path(os.environ.get("EFFCC_CACHE_DIR") or Path.home() / ".cache" / "effcc")


def _path() -> Path:
    return calibration_folder() / f"cpu-{hashlib.sha256(machine().encode()).hexdigest()[:16]}.json"


def _store(device: Device) -> None:
    """Replace the file in one step, so that a process that reads it meanwhile sees the old or the new one."""
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="cpu", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(device)))
        os.replace(name, path)
    except OSError:
        pass  # as the module says: a directory that cannot be written is no error
