"""Whether a value that several results are computed from is better stored than computed again for each of them.

A region compiler computes a cheap value again wherever it is read. A mask that every layer adds to its scores is cheap
for an element, but is computed for all heads of all layers: storing it once and reading it, mostly from a cache, is
then many times faster. Only what is small beside its readers is stored, so that a step's memory hardly changes.
"""

from __future__ import annotations

from typing import NamedTuple

from .devices import Device
from .generated_loops import MEASURED

#: A stored value is at most one such part of the largest result that is computed from it.
SMALL = 4
#: How many times faster storing has to look: what is said of a value does not tell how its readers use their lanes.
CLEARLY = 2.0
#: Names of functions in a region's ops, where the device's figures have others.
_NAMES = {"truediv": "div"}


class SharedValue(NamedTuple):
    """A pointwise value of ``elements`` and ``bytes``, each made by ``ops`` statements, among them ``functions``.
    ``reads``: how many are computed for each result that reads it, ``read_bytes`` the bytes of the largest of these."""

    elements: int
    bytes: int
    boolean: bool
    ops: int
    functions: frozenset[str]
    reads: tuple[int, ...]
    read_bytes: int


def better_stored(value: SharedValue, device: Device) -> bool:
    """On a processor only: a GPU computes what it takes to read a value several times over."""
    if device.kind != "cpu" or value.bytes * SMALL > value.read_bytes:
        return False
    added, loaded = device.added, _statement_seconds(device)
    functions = (_NAMES.get(name, name) for name in value.functions)
    called = sum(added[known].value for name in functions if (known := MEASURED.get(name, name)) in added)
    element = value.ops * loaded + called
    write, read = loaded, loaded
    if value.boolean:  # lane by lane
        write += added["mask_write"].value if "mask_write" in added else 0.0
        read += added["mask_read"].value if "mask_read" in added else 0.0
    moved = value.bytes * (1 + len(value.reads)) / device.bandwidth
    computed = sum(value.reads) * element
    stored = value.elements * (element + write) + sum(value.reads) * read + moved
    return computed > CLEARLY * stored + device.launch.value


def _statement_seconds(device: Device) -> float:
    """Of one statement, for an element: measured, or the published rate of simple operations."""
    measured = device.added.get("statement")
    return measured.value / device.vector_lanes if measured is not None else 1 / device.vector_rate("f32")
