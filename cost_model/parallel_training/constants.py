"""What is calibrated, and the file that it comes from.

Everything else is in the device files or counted. The constants are shares of what the device files and the roofline
say, so that they carry over to other devices, and the host's times, which no device file knows.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...errors import KernelDataError

PACKAGED = Path(__file__).parent / "parallel_training.json"
#: A newer form is refused.
FORMAT = 1


@dataclass(frozen=True)
class Constants:
    """Calibrated figures.

    ``product``, ``attention_product``, ``memory``: rates of matrix products, of those over an attention's scores, and
    of kernels that move bytes, over the roofline's. ``depth``: depth of a product at which half of its rate is reached,
    on the devices that it was calibrated on (``seconds.latency_ratio`` carries it to others). ``fused_attention`` as
    ``product`` for fused kernels (not calibrated, for no row has them: the share of a kernel's rate alone that products
    on these devices were calibrated to reach inside a step, .849; alone, an A100 reaches 267.9 TFLOP/s at a depth of
    2048, by the table of largest measured rates in S. Bekman's Machine Learning Engineering).
    ``host_launch``: seconds of the host for a kernel; ``host_collective``: for a collective or a transfer;
    ``host_rank``: by how much each doubling of the tensor group slows the host. ``exponent`` joins the times of host
    and device, of which the longer counts.
    ``node_link``, ``network``: bandwidth that collectives reach over the published one; ``transfer``: that of sends
    between stages. ``step``: seconds of a step besides.
    """

    product: float = 1.0
    depth: float = 200.0
    attention_product: float = 0.8
    fused_attention: float = 0.85
    memory: float = 0.9
    host_launch: float = 3e-5
    host_collective: float = 1e-4
    host_rank: float = 0.0
    exponent: float = 5.0
    node_link: float = 0.75
    network: float = 0.7
    transfer: float = 0.7
    step: float = 5e-3

    def __post_init__(self) -> None:
        """Raises KernelDataError for what is no figure."""
        for each in fields(self):
            value = getattr(self, each.name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise KernelDataError(
                    f"the constant {each.name} is {value!r}", remedy="calibrate again: effcc calibrate --from-data"
                )


#: Bounds of the fit; what is not here is not fitted. Upper ones keep shares to what good kernels and links reach: nine
#: tenths of peak arithmetic and bandwidth (the device files hold the rest), 240 of NVLink's 300 GB/s.
BOUNDS: dict[str, tuple[float, float]] = {
    "product": (0.5, 1.1),
    "depth": (0.0, 2000.0),
    "attention_product": (0.1, 1.3),
    "memory": (0.2, 1.05),
    "host_launch": (1e-6, 2e-4),
    "host_collective": (0.0, 2e-3),
    "host_rank": (0.0, 1.0),
    "exponent": (1.5, 12.0),
    "node_link": (0.1, 0.8),
    "network": (0.1, 0.95),
    "transfer": (0.05, 0.95),
    "step": (0.0, 0.1),
}


@dataclass(frozen=True)
class Calibration:
    """The constants, the half-widths of 90 % bands (of the log of measured over predicted) and where all of it comes
    from: ``seen`` for the devices that were measured, ``unseen`` for others."""

    constants: Constants = field(default_factory=Constants)
    seen: float = 0.2
    unseen: float = 0.35
    devices: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def band(self, device: str = "") -> tuple[float, float]:
        """Ends of the 90 % band over the prediction; without a device, those of one that was not measured."""
        width = self.seen if device in self.devices else self.unseen
        return math.exp(-width), math.exp(width)


def encode(calibration: Calibration) -> bytes:
    """The calibration as deterministic JSON."""
    value = {
        "format": FORMAT,
        "provenance": dict(calibration.provenance),
        "band": {"seen": calibration.seen, "unseen": calibration.unseen, "devices": list(calibration.devices)},
        "constants": {name: float(f"{number:.6g}") for name, number in asdict(calibration.constants).items()},
    }
    return (json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n").encode()


def decode(data: bytes, where: str) -> Calibration:
    """The calibration in a file's bytes. Raises KernelDataError when it is damaged or newer than this program."""
    try:
        value = json.loads(data)
        if value["format"] != FORMAT:
            raise KernelDataError(
                f"the calibration has form {value['format']}, this program reads {FORMAT}", where=where,
                remedy="update effcc, or make the file again: effcc calibrate --from-data",
            )  # fmt: skip
        band = value["band"]
        widths = float(band["seen"]), float(band["unseen"])
        return Calibration(Constants(**value["constants"]), *widths, tuple(band["devices"]), value["provenance"])
    except (ValueError, KeyError, TypeError) as error:
        raise KernelDataError(
            f"not a calibration of training steps: {error}", where=where,
            remedy="make the file again: effcc calibrate --from-data",
        ) from error  # fmt: skip


def load() -> Calibration:
    """The user's own calibration if there is one, else the packaged one. Raises KernelDataError."""
    own = own_path()
    return decode(own.read_bytes(), str(own)) if own.is_file() else packaged()


@functools.cache
def packaged() -> Calibration:
    """The calibration that comes with the package."""
    return decode(PACKAGED.read_bytes(), str(PACKAGED))


def own_path() -> Path:
    """Where ``effcc calibrate --from-data --steps`` keeps a calibration of the user's own."""
    return Path(os.environ.get("EFFCC_CACHE_DIR") or Path.home() / ".cache" / "effcc") / "parallel_training.json"
