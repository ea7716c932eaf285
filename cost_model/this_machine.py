"""What is known of this machine without measuring: processor, threads, caches, memory."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path


def machine() -> str:
    """This machine in words: processor, usable cores, system, torch."""
    return f"{processor()}, {threads()} threads, {platform.system()} {platform.machine()}, torch {_torch_version()}"


def total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@functools.cache
def cache_sizes() -> tuple[tuple[str, int], ...]:
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
        copies = max(1, threads() // _count(shared))
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
def threads() -> int:
    """Threads torch will use by default: OMP_NUM_THREADS, else the cores this process may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def processor() -> str:
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
