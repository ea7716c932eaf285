"""``@compiled``: numba machine code, kept between processes in effcc's cache directory.

The directory is ``$EFFCC_CACHE_DIR/numba``, by default ``~/.cache/effcc/numba``. Where it cannot be written, code is
compiled anew in each process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

_F = TypeVar("_F", bound=Callable[..., Any])


def cache_directory() -> Path:
    """Where compiled code is kept."""
    root = os.environ.get("EFFCC_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "effcc")
    return Path(root) / "numba"


def compiled(function: _F) -> _F:
    """Compile on first call, without the interpreter lock, so that two searches can run in two threads."""
    directory = cache_directory()
    # numba reads the setting when a function is decorated; the process's own setting is put back after.
    settings: Any = numba.config
    before = settings.CACHE_DIR
    try:
        directory.mkdir(parents=True, exist_ok=True)
        settings.CACHE_DIR = str(directory)
        return cast(_F, numba.njit(cache=True, nogil=True, boundscheck=False)(function))
    except (OSError, RuntimeError):
        return cast(_F, numba.njit(nogil=True, boundscheck=False)(function))
    finally:
        settings.CACHE_DIR = before
