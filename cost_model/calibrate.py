"""Measure this machine's CPU: matrix products by library and layout, memory, call overhead, disk.

The answer is the ``cpu`` device with measured figures, kept as JSON in ``EFFCC_CACHE_DIR`` (default ``~/.cache/effcc``)
under a name made from the machine, its thread count and torch's version. A directory that cannot be written is no
error: the measurement then lasts as long as the process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from ..logs import logger
from .calibration_pass import Pass, measure_pass, with_rate
from .cpu_kernels import LawCase, bandwidth_ladder, fresh_seconds, law_cases, library_laws
from .devices import Cache, Device, Figure, Tier, load_device, parse_device
from .generated_probes import Together, generated_kernels, prepare_probes, vector_lanes
from .measuring_time import SECONDS, Account
from .product_probes import DTYPES
from .this_machine import cache_sizes, machine, processor, threads, total_memory

#: Shares of the seconds for what is measured once, before the two passes and after them.
FRESH, CASCADES = 0.025, 0.05
#: Measures the share of the products' rate that generated cascades reach, in about so many seconds.
CascadeShare: TypeAlias = Callable[[Device, float], float]
#: Seconds that writing to disk is measured for, and the bytes that are written at first and at most.
DISK_SECONDS, DISK_BYTES = 1.0, (4 << 20, 64 << 20)


def calibrate(
    seconds: float = SECONDS,
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
        fresh = fresh_seconds(FRESH * seconds)
    probes, share_of = None, None
    if generated:
        with account.part("generated kernels", compiled=True):
            begun = cascade() if cascade is not None else None
            probes = prepare_probes(together)
            share_of = begun() if begun is not None else None
    with account.part("disk"):
        disk = _disk()
    cascades = CASCADES * seconds if probes is not None and share_of is not None else 0.0
    cases = law_cases() if probes is not None else []
    first = measure_pass(probes, cases, (account.left - cascades) / 2, account)
    found = first.agreed(measure_pass(probes, cases, account.left - cascades, account, first))
    device = _device(found, disk, source)
    if found.generated:
        device = _with_kernels(device, found, cases, fresh, source)
    if found.generated and share_of is not None:
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


def _with_kernels(device: Device, found: Pass, cases: Sequence[LawCase], fresh: float, source: str) -> Device:
    def figure(value: float) -> Figure:
        return Figure(value=value, source=source)

    kernels = generated_kernels(found.generated)
    added = dict(kernels.added) | library_laws(cases, found.laws, kernels.library)
    return msgspec.structs.replace(
        device,
        added={name: figure(max(value, 1e-15)) for name, value in added.items()},
        launch=figure(kernels.call),
        library_call=figure(kernels.library),
        graph_call=figure(max(kernels.graph, 1e-9)),
        parameter_call=figure(max(kernels.parameter, 1e-9)),
        fresh=figure(max(fresh, 1e-15)),
        ladder=tuple(
            Cache(name=f"{moved >> 10} KiB", bytes=figure(float(moved)), bandwidth=figure(rate))
            for moved, rate in bandwidth_ladder(found.walks).items()
        ),
        vector_lanes=vector_lanes(),
    )


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


def _device(found: Pass, disk: float | None, source: str) -> Device:
    generic = load_device("cpu")
    memory = {name: 1 / seconds for name, seconds in found.memory.items()}
    gemm = tuple(with_rate(each, seconds) for each, seconds in found.products.items())

    def figure(value: float) -> Figure:
        return Figure(value=value, source=source)

    peak = max(memory["copy"], memory["pointwise"], memory["reduction"])
    capacity = figure(float(total_memory() or generic.memory))
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
        for name, size in cache_sizes()
    )
    measured = {"memory": memory["pointwise"] / peak, "reduction": memory["reduction"] / peak, "gemm": 1.0}
    efficiency = dict(generic.efficiency) | {kind: figure(value) for kind, value in measured.items()}
    return changed(
        generic,
        title=f"{processor()} (calibrated)",
        matrix=matrix,
        tiers=tiers,
        caches=caches or generic.caches,
        units=figure(float(threads())),
        launch=figure(found.memory["call"]),
        efficiency=efficiency,
        gemm=gemm,
        threads=threads(),
        machine=machine(),
    )


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
