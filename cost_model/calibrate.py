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
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .cpu_kernels import fresh_seconds, in_turn, sets_of
from .devices import Cache, Device, Figure, GemmMeasurement, Tier, load_device, parse_device

if TYPE_CHECKING:
    import torch

LAYOUTS = ("forward", "input_gradient", "weight_gradient")
#: (tokens, input features, output features) of the linear layers whose three products are measured: from a single
#: token to a training batch, square and oblong.
LINEAR_SHAPES = (
    (1, 1024, 1024),
    (16, 1024, 1024),
    (128, 768, 768),
    (512, 512, 2048),
    (512, 2048, 512),
    (1024, 1024, 1024),
    (2048, 256, 1024),
    (1024, 256, 8192),
    (256, 128, 128),
    (64, 512, 512),
    (2048, 1024, 256),
    (128, 64, 2048),
)
#: (products, m, k, n) of batched products.
BATCHED_SHAPES = (
    (8, 128, 64, 128),
    (8, 128, 128, 64),
    (16, 256, 32, 256),
    (16, 256, 256, 32),
    (64, 64, 64, 64),
    (4, 512, 64, 512),
    (4, 512, 512, 64),
    (128, 32, 32, 32),
    (32, 16, 128, 16),
)
_SHORT = {"f32": "float32", "bf16": "bfloat16"}


def calibrate(
    seconds: float = 20.0,
    save: bool = True,
    generated: bool = True,
    cascade: Callable[[Device], float | None] | None = None,
) -> Device:
    """Measure the CPU for about ``seconds`` and return it; keeps the result for ``calibrated_device`` if ``save``. To
    measure generated kernels too takes a C++ compiler and some 20 seconds more. ``cascade`` measures the share of the
    products' rate that generated cascades reach."""
    fresh = fresh_seconds(seconds / 40)
    gemm = (*_products(0.5 * seconds), *_batched(0.1 * seconds))
    source = f"measured on {machine()} by effcc calibrate"
    memory = _memory(0.15 * seconds)
    device = _device(gemm, memory, _launch(), _disk(), source)
    if generated:
        device = _with_kernels(device, 0.25 * seconds, source, fresh)
    share = cascade(device) if cascade is not None and device.added else None
    if share is not None:
        efficiency = dict(device.efficiency) | {"cascade": Figure(value=share, source=source)}
        device = msgspec.structs.replace(device, efficiency=efficiency)
    if save:
        _store(device)
        calibrated_device.cache_clear()
    return device


@functools.cache
def calibrated_device() -> Device:
    """This machine's CPU as last calibrated (with this torch and thread count), else the generic ``cpu``."""
    path = _path()
    try:
        return parse_device(path.read_bytes(), where=str(path))
    except OSError:
        return load_device("cpu")


def measure_product(dtype: str, layout: str, m: int, k: int, n: int, seconds: float) -> tuple[GemmMeasurement, ...]:
    """FLOP a second of each library that is there on (m, k) @ (k, n) with operands laid out as in ``layout``; median
    of interleaved rounds for about ``seconds``."""
    import torch

    kind = getattr(torch, _SHORT[dtype])

    def matrix(rows: int, columns: int, transposed: bool) -> torch.Tensor:
        made = torch.rand((columns, rows) if transposed else (rows, columns), dtype=torch.float32).to(kind)
        return made.t() if transposed else made

    # In a step an operand was made, or read, long before: sets of operands take turns, so that none is in a near cache.
    sets = [
        (matrix(m, k, layout == "weight_gradient"), matrix(k, n, layout == "forward"))
        for _ in range(sets_of((m * k + k * n) * kind.itemsize))
    ]

    def onednn(left: torch.Tensor, right: torch.Tensor) -> Any:
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")

    candidates = {"blas": in_turn(torch.mm, sets)}
    if _has_onednn(dtype):
        candidates["onednn"] = in_turn(onednn, sets)
    best = _interleaved(candidates, seconds)
    flop = 2.0 * m * k * n
    return tuple(
        GemmMeasurement(library=library, dtype=dtype, layout=layout, m=m, k=k, n=n, rate=flop / best[library])
        for library in candidates
    )


def machine() -> str:
    """This machine in words: processor, usable cores, system, torch."""
    return f"{_processor()}, {_threads()} threads, {platform.system()} {platform.machine()}, torch {_torch_version()}"


def _products(seconds: float) -> Iterator[GemmMeasurement]:
    """The three products of each linear layer: x @ w.t(), dy @ w, dy.t() @ x."""
    share = seconds / (len(LINEAR_SHAPES) * len(LAYOUTS) * len(_SHORT))
    for dtype in _SHORT:
        for tokens, features, outputs in LINEAR_SHAPES:
            sizes = {
                "forward": (tokens, features, outputs),
                "input_gradient": (tokens, outputs, features),
                "weight_gradient": (outputs, tokens, features),
            }
            for layout in LAYOUTS:
                yield from measure_product(dtype, layout, *sizes[layout], seconds=share)


def _batched(seconds: float) -> Iterator[GemmMeasurement]:
    """Batched products, both operands row-major."""
    import torch

    share = seconds / (len(BATCHED_SHAPES) * len(_SHORT))
    for dtype, name in _SHORT.items():
        kind = getattr(torch, name)
        for batch, m, k, n in BATCHED_SHAPES:
            count = sets_of(batch * k * (m + n) * kind.itemsize)
            sets = [(torch.rand(batch, m, k).to(kind), torch.rand(batch, k, n).to(kind)) for _ in range(count)]
            best = _interleaved({"blas": in_turn(torch.bmm, sets)}, share)["blas"]
            rate = 2.0 * batch * m * k * n / best
            yield GemmMeasurement(library="blas", dtype=dtype, layout="batched", m=m, k=k, n=n, rate=rate, batch=batch)


def _with_kernels(device: Device, seconds: float, source: str, fresh: float) -> Device:
    """The device with what generated kernels and library ops reach, as far as it can be measured here."""
    from .cpu_kernels import bandwidth_ladder, library_laws, measure_generated, vector_lanes

    found = measure_generated()
    if found is None:
        return device

    def figure(value: float) -> Figure:
        return Figure(value=value, source=source)

    ladder = bandwidth_ladder(seconds / 2, device.launch.value)
    added = dict(found.added) | library_laws(seconds / 2, found.library)
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
            for moved, rate in ladder.items()
        ),
        vector_lanes=vector_lanes(),
    )


def _has_onednn(dtype: str) -> bool:
    """Whether oneDNN has products in ``dtype`` on this processor: bf16 takes more than AVX2."""
    import torch

    available: Any = torch.backends.mkldnn.is_available
    if not available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype != "bf16" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _interleaved(candidates: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of each candidate, in rounds that take turns, at least three after one to warm up: what it takes in a
    step, where the shortest time is rare."""
    import torch

    spent: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for run in candidates.values():
            run()
        begin = time.perf_counter()
        rounds = 0
        while rounds < 3 or time.perf_counter() - begin < seconds:
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                spent[name].append(time.perf_counter() - start)
            rounds += 1
            if rounds >= 3 and time.perf_counter() - begin > 3 * seconds:
                break
    return {name: statistics.median(found) for name, found in spent.items()}


def _memory(seconds: float) -> dict[str, float]:
    """Bytes a second, read and written: ``copy``, ``pointwise`` (two read, one written), ``reduction`` on sizes beyond
    any cache, and ``cache <bytes>`` for a pointwise op whose working set is half of each cache."""
    import torch

    count = 1 << 25  # 128 MiB of f32
    a, b, out = (torch.ones(count) for _ in range(3))
    share = seconds / (3 + len(_cache_sizes()))
    found = {
        "copy": 8 * count / _interleaved({"_": lambda: out.copy_(a)}, share)["_"],
        "pointwise": 12 * count / _interleaved({"_": lambda: torch.add(a, b, out=out)}, share)["_"],
        "reduction": 4 * count / _interleaved({"_": lambda: torch.sum(a)}, share)["_"],
    }
    for _, size in _cache_sizes():
        part = max(1024, size // 2 // 12)
        x, y, z = a[:part], b[:part], out[:part]
        run = functools.partial(torch.add, x, y, out=z)
        overhead = _launch()
        spent = max(_interleaved({"_": run}, share)["_"] - overhead, 1e-7)
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


def _disk(size: int = 64 << 20) -> float | None:
    """Bytes a second of writing a file through to the disk that holds temporary files; None where that fails."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile() as file:
            begin = time.perf_counter()
            for _ in range(size >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return size / (time.perf_counter() - begin)
    except OSError:
        return None


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
    for dtype in _SHORT:
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
