"""Where compiled code and measurements are kept between processes, and what is done when it cannot be written."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import warnings
from pathlib import Path


@functools.cache
def usable_directory(path: Path) -> Path:
    """``path``, made if it does not exist; a temporary directory of this process, with a warning, where it cannot be
    written (read-only, no space, a file in its place)."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"\0")
    except OSError as error:
        substitute = Path(tempfile.mkdtemp(prefix="effcc-"))
        atexit.register(shutil.rmtree, substitute, ignore_errors=True)
        warnings.warn(
            f"effcc: the cache directory {path} cannot be written ({error.strerror or error}); "
            f"this process keeps its compiled code in {substitute}. Set EFFCC_CACHE_DIR to a directory that can.",
            RuntimeWarning,
            stacklevel=2,
        )
        return substitute
    return path


def code_directory(chosen: Path | None) -> Path | None:
    """The directory of Inductor's code cache: below the one that the user has chosen, else Inductor's own; None leaves
    that as it is."""
    from_torch = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if chosen is not None:
        return usable_directory(chosen) / "inductor"
    if from_torch:
        usable = usable_directory(Path(from_torch))
        return None if usable == Path(from_torch) else usable
    return None
