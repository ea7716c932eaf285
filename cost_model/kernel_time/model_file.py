"""The trained model as a file: gzipped JSON of figures, constants and trees. Reading it executes nothing."""

from __future__ import annotations

import functools
import gzip
import json
import math
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from ...errors import KernelDataError
from . import trees
from .adaptation import Scales
from .core_gemm import TILES, GemmConstants
from .core_memory import MemoryConstants
from .features import feature_names
from .gpus import Gpu
from .model import Expert, FamilyModel, KernelModel, Mixture
from .rows import FAMILIES, GEMM_FAMILIES

#: The model that comes with the package.
PACKAGED = Path(__file__).parent / "kernel_times.json.gz"
#: A newer form is refused.
FORMAT = 3
#: Bytes of the unpacked file that are read at most.
_MOST_BYTES = 64 * 2**20


def encode(model: KernelModel) -> bytes:
    """The model as deterministic gzipped JSON."""
    value = {
        "format": FORMAT,
        "provenance": model.provenance,
        "scales": asdict(model.scales),
        "family_scales": {name: asdict(scales) for name, scales in model.family_scales.items()},
        "deviations": model.deviations,
        "families": {name: _family(family) for name, family in model.families.items()},
    }
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode(), 9, mtime=0)


def _family(family: FamilyModel) -> dict[str, Any]:
    return {
        "constants": asdict(family.constants),
        "measured_constants": asdict(family.measured_constants or family.constants),
        "mixture": asdict(family.mixture),
        "shares": family.shares,
        "bands": {
            kind: [[end if math.isfinite(end) else None, _short(low), _short(high)] for end, low, high in bins]
            for kind, bins in family.bands.items()
        },
        "experts": [
            {
                "gpu": msgspec.to_builtins(expert.gpu),
                "host": expert.host,
                "tiles": expert.tiles,
                "clock": expert.clock,
                "trees": None if expert.trees is None else trees.to_json(expert.trees),
            }
            for expert in family.experts
        ],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def decode(data: bytes, where: str) -> KernelModel:
    """The model in a file's bytes. Raises KernelDataError when it is damaged or newer than this program."""
    try:
        unpacker = zlib.decompressobj(wbits=31)
        text = unpacker.decompress(data, _MOST_BYTES)
        if not unpacker.eof:
            raise ValueError("it is cut off or too large")
        value = json.loads(text)
        form = value["format"]
        if form != FORMAT:
            raise KernelDataError(
                f"the kernel-time model has form {form!r}, this program reads {FORMAT}",
                where=where,
                remedy="make it again with this version: effcc calibrate --from-data",
            )
        families = {name: _read_family(name, each, where) for name, each in value["families"].items()}
        scales = _read_scales(value["scales"])
        own = {name: _read_scales(each) for name, each in value.get("family_scales", {}).items()}
        deviations = {name: [float(number) for number in numbers] for name, numbers in value["deviations"].items()}
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError, msgspec.ValidationError) as error:
        raise KernelDataError(
            f"not a kernel-time model: {error}", where=where, remedy="make it again: effcc calibrate --from-data"
        ) from error
    return KernelModel(families, deviations, scales, dict(value.get("provenance", {})), own)


def _read_scales(value: dict[str, Any]) -> Scales:
    return Scales(**{key: float(number) for key, number in value.items()})


def _read_family(name: str, value: dict[str, Any], where: str) -> FamilyModel:
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}")
    form = GemmConstants if name in GEMM_FAMILIES else MemoryConstants
    constants, measured = (
        form(**{key: float(number) for key, number in value[part].items()})
        for part in ("constants", "measured_constants")
    )
    width = len(feature_names(name))
    experts = []
    for each in value["experts"]:
        tiles = tuple((int(rows), int(columns)) for rows, columns in each["tiles"])
        if any(tile not in TILES for tile in tiles) or (name in GEMM_FAMILIES and not tiles):
            raise ValueError(f"tiles {tiles} are not known")
        grown = None if each["trees"] is None else trees.from_json(each["trees"], width, where)
        experts.append(
            Expert(msgspec.convert(each["gpu"], type=Gpu), float(each["host"]), tiles, grown, float(each["clock"]))
        )
    if not experts:
        raise ValueError(f"{name} has no measured device")
    bands = {
        kind: [(math.inf if end is None else float(end), float(low), float(high)) for end, low, high in bins]
        for kind, bins in value["bands"].items()
    }
    shares = {key: float(number) for key, number in value["shares"].items()}
    mixture = Mixture(**{key: float(number) for key, number in value["mixture"].items()})
    return FamilyModel(constants, tuple(experts), mixture, shares, bands, measured)


def load(path: Path | None = None) -> KernelModel:
    """The model in a file, or (without one) the user's own if there is one, else the packaged one."""
    return _load(path or (own_path() if own_path().is_file() else PACKAGED))


@functools.lru_cache(maxsize=4)
def _load(path: Path) -> KernelModel:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise KernelDataError(
            f"cannot read the kernel-time model {path}: {error.strerror}",
            remedy="effcc calibrate --from-data makes one",
        ) from error
    return decode(data, str(path))


def own_path() -> Path:
    """Where ``effcc calibrate --from-data`` keeps a model of the user's own."""
    return Path(os.environ.get("EFFCC_CACHE_DIR") or Path.home() / ".cache" / "effcc") / "kernel_times.json.gz"


def write(path: Path, data: bytes) -> None:
    """Write a model's file whole or not at all. Raises OutputError."""
    from ...ir.plan_file import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    _load.cache_clear()
