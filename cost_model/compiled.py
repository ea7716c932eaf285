"""``@compiled``: numba machine code, kept between processes in effcc's cache directory.

The directory is ``$EFFCC_CACHE_DIR/numba``, by default ``~/.cache/effcc/numba``, with a folder for each state of the
sources beside the function: numba itself looks only at the file that a function stands in, and not at those whose
functions it calls. Where it cannot be written, code is compiled anew in each process. Every function is only ever
called with one combination of types (C order), so that processes that compile at once write the same code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

_F = TypeVar("_F", bound=Callable[..., Any])


@cache
def cache_directory(sources: Path) -> Path:
    """Where the compiled code of a folder of sources is kept."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(sources.glob("*.py")):
        digest.update(source.read_bytes())
    root = os.environ.get("EFFCC_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "effcc")
    return Path(root) / "numba" / digest.hexdigest()[:16]


def compiled(function: _F) -> _F:
    """Compile on first call, without the interpreter lock, so that two searches can run in two threads."""
    # numba reads the setting when a function is decorated; the process's own setting is put back after.
    config: Any = numba.config
    before = config.CACHE_DIR
    try:
        directory = cache_directory(Path(function.__code__.co_filename).parent)
        directory.mkdir(parents=True, exist_ok=True)
        config.CACHE_DIR = str(directory)
        return cast(_F, numba.njit(cache=True, nogil=True, boundscheck=False)(function))
    except (OSError, RuntimeError):
        return cast(_F, numba.njit(nogil=True, boundscheck=False)(function))
    finally:
        config.CACHE_DIR = before
