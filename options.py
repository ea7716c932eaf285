"""The options of ``torch.compile(model, backend="effcc", options={...})``: one typed class, unknown keys refused."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import OptionError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(value: int | str, *, option: str = "memory_budget") -> int:
    """Bytes from a number or a text such as ``8GiB`` or ``512 MB``. Raises OptionError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise OptionError(f"{option} must be bytes or a text like '8GiB', not {value!r}", where=f"option {option!r}")
    if isinstance(value, int):
        number, unit = float(value), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = match[2].upper() if match else "?"
        if match is None or unit not in _UNITS:
            raise OptionError(
                f"{option} {value!r} is not a size",
                where=f"option {option!r}",
                remedy="Write bytes (8589934592) or a number with a unit: KiB, MiB, GiB, KB, MB, GB.",
            )
        number = float(match[1])
    size = int(number * _UNITS[unit])
    if size <= 0:
        raise OptionError(f"{option} must be more than 0 bytes, not {value!r}", where=f"option {option!r}")
    return size


@dataclass(frozen=True)
class Options:
    """What a user may set. All have defaults; see ``docs/options.md``."""

    #: Most bytes that the process may hold on the device during a step; ``"auto"``: what is free there, with what the
    #: process holds already. Values are recomputed to keep it; what cannot be kept is refused with its floor.
    memory_budget: int | str | None = None
    #: Under a budget, saved values may also spend the time between forward and backward on the host: in pinned memory
    #: for a GPU, in files (of ``swap_dir``, else the system's temporary directory) for the CPU.
    swap: bool = False
    swap_dir: str | None = None
    #: Path of a plan made offline; its graph must be the captured one.
    plan: str | None = None
    #: Directory that receives ``NNN-pass.ir`` for every pass that changed something.
    dump_dir: str | None = None
    #: Device file that costs are taken from; default: what the tensors lie on.
    device: str | None = None
    #: Directory of the persistent cache.
    cache_dir: str | None = None
    #: ``"eager"``: what cannot be compiled runs as eager ops, with a reason in the report. ``"error"``: it raises.
    fallback: str = "eager"
    #: Verify the IR before and after every pass.
    verify: bool = True
    #: Let Dynamo trace structurally equal modules once. The backend reads it while a frame is traced.
    repeated_modules: bool = True
    #: Fuse dependent reductions (attention, losses) into one-pass kernels where the cost model says it pays.
    cascades: bool = True
    #: GEMM library for float32 on CPU: ``"measure"`` times the candidates once per shape class, or a fixed one.
    gemm: str = "measure"
    #: Order of a region's kernels: ``"memory"``: that which needs the least at once, by CP-SAT; ``"inductor"``: the
    #: best of Inductor's heuristics.
    kernel_order: str = "memory"
    #: Let the C library keep what a step on the CPU frees for the next one, up to 2 GiB, instead of giving it back to
    #: the system.
    keep_freed_memory: bool = True
    #: Run a graph with its cascades fused and as it is written, where the cost model cannot tell which is faster.
    measure_candidates: bool = False

    def chosen_cache(self) -> Path | None:
        """The cache directory that the user has set, by option or by ``EFFCC_CACHE_DIR``."""
        text = self.cache_dir or os.environ.get("EFFCC_CACHE_DIR")
        return Path(text).expanduser() if text else None

    def cache_path(self) -> Path:
        return self.chosen_cache() or default_cache_dir()


_CHOICES = {
    "fallback": ("eager", "error"),
    "gemm": ("measure", "onednn", "blas"),
    "kernel_order": ("memory", "inductor"),
}
_TYPES: dict[str, tuple[type, ...]] = {
    "verify": (bool,),
    "repeated_modules": (bool,),
    "swap": (bool,),
    "cascades": (bool,),
    "keep_freed_memory": (bool,),
    "measure_candidates": (bool,),
}
_TEXTS = ("plan", "dump_dir", "device", "cache_dir", "swap_dir")


def default_cache_dir() -> Path:
    """``EFFCC_CACHE_DIR``, else ``~/.cache/effcc``."""
    return Path(os.environ.get("EFFCC_CACHE_DIR") or "~/.cache/effcc").expanduser()


def parse_options(given: Mapping[str, Any] | Options | None) -> Options:
    """Options from what ``torch.compile`` was given. Raises OptionError for a bad value or an unknown key, which it
    answers with a suggestion."""
    if isinstance(given, Options):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(f"options must be a dict, not {type(given).__name__}", where="torch.compile(options=...)")
    values = dict(given or {})
    known = [item.name for item in fields(Options)]
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise OptionError(
                f"unknown option {key!r}",
                where="torch.compile(options=...)",
                remedy=f"{hint}The options are: {', '.join(known)}.",
            )
        if key in _CHOICES and value not in _CHOICES[key]:
            raise OptionError(
                f"option {key!r} is {value!r}",
                where=f"option {key!r}",
                remedy=f"Choose one of: {', '.join(_CHOICES[key])}.",
            )
        if key in _TYPES and type(value) not in _TYPES[key]:
            wanted = _TYPES[key][0].__name__
            raise OptionError(f"option {key!r} must be {wanted}, not {value!r}", where=f"option {key!r}")
        if key in _TEXTS and value is not None:
            if not isinstance(value, str | os.PathLike):
                raise OptionError(f"option {key!r} must be a text, not {value!r}", where=f"option {key!r}")
            values[key] = os.fspath(value)
    if values.get("memory_budget") not in (None, "auto"):
        values["memory_budget"] = parse_bytes(values["memory_budget"])
    return Options(**values)
