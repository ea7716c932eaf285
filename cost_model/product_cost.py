"""Seconds of a matrix product on a calibrated CPU: measured itself, or by a law fitted to the products that were.

    seconds = call + flop / rate + a · m·k + b · k·n + c · m·n

The last three are packing of the operands and writing of the result, which is why narrow products are slow. The
coefficients are least squares on relative errors with none below zero, fitted to what ``effcc calibrate`` measured on
this machine, one law for each library. Products that compilation has timed here (``gemm_measurement.py``) cost
what they took.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .devices import Device, GemmMeasurement
from .gemm_measurement import LIBRARIES, SMALL_FLOP, faster_library
from .law_fit import nonnegative_fit

#: Least measured products that the law is fitted to.
FEWEST = 8


@dataclass(frozen=True)
class ProductLaw:
    call: float
    per_flop: float
    left: float
    right: float
    result: float

    def seconds(self, batch: int, m: int, k: int, n: int) -> float:
        moved = self.left * m * k + self.right * k * n + self.result * m * n
        return self.call + batch * (2.0 * m * k * n * self.per_flop + moved)


_laws: dict[tuple[int, str, bool], tuple[object, dict[str, ProductLaw]]] = {}


def laws_of(device: Device, dtype: str, batched: bool = False) -> dict[str, ProductLaw]:
    """Library -> the law of a calibrated device's products; without those of which too few were measured."""
    key = (id(device.gemm), dtype, batched)
    found = _laws.get(key)
    if found is None or found[0] is not device.gemm:
        rows = [entry for entry in device.gemm if entry.dtype == dtype and (entry.batch > 1) == batched]
        by_library = {entry.library: [each for each in rows if each.library == entry.library] for entry in rows}
        laws = {library: fit(entries) for library, entries in by_library.items() if len(entries) >= FEWEST}
        found = _laws[key] = (device.gemm, laws)
    return found[1]


def chosen_library(device: Device, dtype: str, batch: int, m: int, k: int, n: int) -> tuple[str, float] | None:
    """The library that compilation would choose for a product, and its seconds without the call; None where nothing
    was measured. Products in a batch are BLAS's, and so are all that are not f32."""
    batched = laws_of(device, dtype, batched=True) if batch > 1 else {}
    laws = batched or laws_of(device, dtype)
    seconds = {library: law.seconds(batch, m, k, n) - law.call for library, law in laws.items()}
    if not seconds:
        return None
    library = "blas" if "blas" in seconds else min(seconds, key=seconds.__getitem__)
    if batch == 1 and dtype == "f32" and 2 * m * k * n >= SMALL_FLOP and seconds.keys() >= LIBRARIES:
        library = device.library or faster_library(seconds)
    return library, seconds[library]


def fit(rows: Sequence[GemmMeasurement]) -> ProductLaw:
    """The law that explains measured products best."""
    fastest: dict[tuple[str, int, int, int, int], float] = {}
    for entry in rows:
        key = (entry.layout, entry.batch, entry.m, entry.k, entry.n)
        fastest[key] = max(entry.rate, fastest.get(key, 0.0))
    parts, seconds = [], []
    for (_, batch, m, k, n), rate in fastest.items():
        flop = 2.0 * batch * m * k * n
        parts.append((1.0, flop, batch * m * k, batch * k * n, batch * m * n))
        seconds.append(flop / rate)
    return ProductLaw(*nonnegative_fit(parts, seconds))


def timed_product(folder: Path, m: int, k: int, n: int, library: str = "") -> tuple[str, float] | None:
    """Library and seconds of an f32 product that was timed on this machine while something was compiled: the library
    that is asked for, or the faster one."""
    try:
        stamp = (folder / "gemm.json").stat().st_mtime_ns
    except OSError:
        return None
    return _timed(folder, stamp, library).get((m, k, n))


@functools.lru_cache(maxsize=4)
def _timed(folder: Path, stamp: int, asked: str) -> dict[tuple[int, int, int], tuple[str, float]]:
    from .gemm_measurement import machine_name, read_measurements

    found: dict[tuple[int, int, int], list[tuple[str, float]]] = {}
    for key, entry in read_measurements(folder / "gemm.json").get(machine_name(), {}).items():
        sizes = key.split(" ")[0].split("x")
        if len(sizes) != 3 or not entry.keys() >= LIBRARIES:
            continue
        library = asked or faster_library(entry)
        m, k, n = map(int, sizes)
        found.setdefault((m, k, n), []).append((library, entry[library]))
    # One shape in several layouts: their geometric mean, the roofline does not know which it is.
    return {
        shape: (entries[0][0], math.exp(sum(math.log(seconds) for _, seconds in entries) / len(entries)))
        for shape, entries in found.items()
    }
