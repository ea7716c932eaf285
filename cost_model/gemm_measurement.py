"""Time the libraries that can run a matrix product on this machine, once per distinct product, and remember it.

The answers lie in ``gemm.json`` in the cache directory, keyed by machine, torch version and thread count, and are
shared between processes. A directory that cannot be written is not an error: the answers then last as long as the
process.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Products below this many FLOP take BLAS unmeasured: the call costs more than the product.
SMALL_FLOP = 2_000_000
#: Rounds that are timed at least and at most, and the seconds after which those in between are left out.
FEWEST, ROUNDS, ROUND_SECONDS = 5, 15, 0.03
#: Bytes of operands that are walked over.
WALKED = 16 << 20
#: How many times as long as the other a library may take to be timed beside it.
FAR = 5.0
#: Share of the processor that a measurement must have had.
BUSY = 0.75
#: How much faster oneDNN must be: a tie keeps BLAS, which can write to a given address.
MARGIN = 0.9
LIBRARIES = frozenset({"blas", "onednn"})

Product = tuple[int, int, int, tuple[int, int], tuple[int, int]]


class GemmMeasurements:
    """Library of a product by measurement. Call it with (m, k, n, left strides, right strides)."""

    def __init__(self, directory: Path | None, mode: str = "measure") -> None:
        self.mode = mode
        self.path = directory / "gemm.json" if directory is not None else None
        self.machine = machine_name()
        self.lock = threading.Lock()
        self.known: dict[str, dict[str, float]] = self.load()

    def __call__(self, m: int, k: int, n: int, left: tuple[int, int], right: tuple[int, int]) -> str:
        if not has_onednn() or 2 * m * k * n < SMALL_FLOP:
            return "blas"
        if self.mode in LIBRARIES:
            return self.mode
        key = f"{m}x{k}x{n} {layout(left, (m, k))}{layout(right, (k, n))}"
        with self.lock:
            seconds = self.known.get(key)
            if seconds is None:
                seconds = measure((m, k, n, left, right))
                if seconds is None:  # other work held the processor: the next compilation measures again
                    return "blas"
                self.known[key] = seconds
                self.save()
        return faster_library(seconds)

    def load(self) -> dict[str, dict[str, float]]:
        if self.path is None:
            return {}
        stored = read_measurements(self.path).get(self.machine, {})
        return {key: entry for key, entry in stored.items() if entry.keys() >= LIBRARIES}

    def save(self) -> None:
        if self.path is None:
            return
        try:
            keep_measurements(self.path, self.machine, self.known)
        except OSError:
            self.path = None


def faster_library(seconds: Mapping[str, float]) -> str:
    return "onednn" if seconds["onednn"] < MARGIN * seconds["blas"] else "blas"


def keep_measurements(path: Path, machine: str, known: Mapping[str, dict[str, float]]) -> None:
    """Merge with what other processes stored, and replace the file in one step. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = read_measurements(path)
    stored.setdefault(machine, {}).update(known)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump(stored, file)
    os.replace(name, path)


def read_measurements(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Machine -> product -> library -> seconds. What is damaged counts as not measured."""
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for machine, products in stored.items() if isinstance(stored, dict) else ():
        for product, entry in products.items() if isinstance(products, dict) else ():
            if isinstance(entry, dict) and all(isinstance(seconds, int | float) for seconds in entry.values()):
                found.setdefault(machine, {})[product] = {name: float(seconds) for name, seconds in entry.items()}
    return found


def machine_name() -> str:
    """What a measurement depends on besides the product: processor, torch version and number of threads."""
    import torch

    architecture = platform.processor() or platform.machine()
    return f"{architecture} {cpu_model()} torch {torch.__version__} threads {torch.get_num_threads()}"


def has_onednn() -> bool:
    from torch.backends import mkldnn

    return bool(mkldnn.is_available())  # type: ignore[no-untyped-call]


def layout(stride: tuple[int, int], shape: tuple[int, int]) -> str:
    """``n`` for row-major, ``t`` for column-major, else the strides."""
    if stride == (shape[1], 1):
        return "n"
    if stride == (1, shape[0]):
        return "t"
    return f"[{stride[0]},{stride[1]}]"


def measure(product: Product) -> dict[str, float] | None:
    """Seconds of each library: the median of interleaved rounds, on operands of the product's layout, which take turns
    as results do: in a step they are in no near cache. None when other processes (a C++ compiler in the background)
    took so much of the processor that the figures mean nothing."""
    with real_tensors():
        return _measure(product)


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """While a graph is compiled, fake-tensor and tracing modes are on, under which a product takes no time at all."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _measure(product: Product) -> dict[str, float] | None:
    import torch

    m, k, n, left, right = product
    count = max(2, min(ROUNDS, -(-WALKED // (4 * (m * k + k * n)))))
    sets = [(operand((m, k), left), operand((k, n), right)) for _ in range(count)]
    candidates: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "blas": torch.mm,
        "onednn": lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""),
    }
    spent: dict[str, list[float]] = {name: [] for name in candidates}
    held: collections.deque[torch.Tensor] = collections.deque(maxlen=max(1, min(count, WALKED // (8 * m * n))))
    warm: dict[str, float] = {}
    for name, run in candidates.items():
        for _ in range((held.maxlen or 0) + 1):  # until it has the memory that it needs
            start = time.perf_counter()
            held.append(run(*sets[-1]))
            warm[name] = time.perf_counter() - start
    # One that is far slower takes no turns: threads that wait for it fall asleep, and the other one wakes them.
    slow = {name: taken for name, taken in warm.items() if taken > FAR * min(warm.values())}
    candidates = {name: run for name, run in candidates.items() if name not in slow}
    begin, used = time.perf_counter(), time.process_time()
    turn = itertools.cycle(sets)
    for done in range(ROUNDS):
        for name, run in candidates.items():
            operands = next(turn)
            start = time.perf_counter()
            held.append(run(*operands))
            spent[name].append(time.perf_counter() - start)
        if done + 1 >= FEWEST and time.perf_counter() - begin > ROUND_SECONDS:
            break
    share = (time.process_time() - used) / (time.perf_counter() - begin)
    if share < BUSY * min(torch.get_num_threads(), os.cpu_count() or 1):
        return None
    return slow | {name: statistics.median(spent[name]) for name in candidates}


def operand(shape: tuple[int, int], stride: tuple[int, int]) -> torch.Tensor:
    """Finite data of the given strides (subnormal numbers in uninitialised memory would slow a product down)."""
    import torch

    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return torch.ones(max(extent, 1), dtype=torch.float32).as_strided(shape, stride)


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""
