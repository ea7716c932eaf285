"""A mesh of devices: its axes, the groups that communicate, and where their members sit in nodes.

Ranks are laid out with tensor parallelism innermost, then context, sharded data, replicated data, and the pipeline
outermost: the order of Megatron-LM, which keeps the busiest groups within a node. Experts are spread over ``ep`` of the
data ranks (context included), which is no axis of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from ...errors import OptionError
from ..collectives import CollectiveCost, collective_cost
from ..devices import Device

AXES = ("dp", "fsdp", "tp", "pp", "cp", "ep")
#: From the innermost.
_ORDER = ("tp", "cp", "fsdp", "dp", "pp")


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis: replicated data, sharded data, tensors, pipeline stages, context, experts."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise OptionError(f"axis {axis} of the mesh is {getattr(self, axis)}", remedy="give 1 or more")
        if (self.dp * self.fsdp * self.cp) % self.ep:
            raise OptionError(
                f"ep={self.ep} does not divide the {self.dp * self.fsdp * self.cp} data ranks (dp x fsdp x cp)",
                remedy="experts are spread over data ranks: choose a divisor",
            )

    @property
    def ranks(self) -> int:
        return self.dp * self.fsdp * self.tp * self.pp * self.cp

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.dp * self.fsdp

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours of an axis; of ``ep`` that of the innermost data axis."""
        if axis == "ep":
            return self.tp
        return math.prod(getattr(self, inner) for inner in _ORDER[: _ORDER.index(axis)])

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "dp=1"


def parse_mesh(text: str) -> Mesh:
    """``dp=8,tp=8,pp=4`` with any of the axes dp, fsdp, tp, pp, cp, ep. Raises OptionError."""
    found = read_axes(text, "dp=8,tp=8,pp=4")
    if other := [axis for axis in found if axis not in AXES]:
        raise OptionError(f"--mesh: unknown axis {other[0]!r}", remedy=f"the axes are {', '.join(AXES)}")
    return Mesh(**found)


def read_axes(text: str, example: str) -> dict[str, int]:
    """Sizes by axis, of ``axis=size,axis=size``. Raises OptionError, with ``example``, for anything else."""
    found: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = part.strip().partition("=")
        if not equals or not size.isdecimal() or not int(size) or axis in found:
            raise OptionError(f"--mesh {text!r} is not understood", remedy=f"write {example}")
        found[axis] = int(size)
    return found


def group_cost(kind: str, size: float, ranks: int, stride: int, device: Device) -> CollectiveCost:
    """Cost of a collective over ``ranks`` devices that lie ``stride`` apart, when all such groups of the mesh run it at
    once (each device then has its own share of its node's links). ``size`` as for ``collective_cost``.

    Raises DeviceError where the group leaves the node and the device file names no network.
    """
    if ranks == 1 or size == 0:
        return CollectiveCost(0.0, "none", 0.0)
    node = next((link for link in device.links if link.scope == "node"), None)
    if node is None:
        return collective_cost(kind, size, ranks, device)
    inside = max(1, node.devices // stride)
    links = tuple(msgspec.structs.replace(link, devices=inside) if link is node else link for link in device.links)
    if inside == 1:  # one member a node
        links = tuple(link for link in links if link.scope != "node")
    return collective_cost(kind, size, ranks, msgspec.structs.replace(device, links=links))


def neighbour_seconds(size: float, stride: int, device: Device) -> float:
    """Seconds to send ``size`` bytes to the rank ``stride`` further."""
    return group_cost("send", size, 2, stride, device).seconds
