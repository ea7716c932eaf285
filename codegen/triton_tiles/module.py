"""Generated Triton source as Python functions, in memory: the source is shown by tracebacks and read by Triton's
compiler as if it were a file's."""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Iterable
from typing import Any

from ...errors import MissingExtraError
from .prelude import PRELUDE
from .printer import TritonFunction


def print_module(functions: Iterable[TritonFunction]) -> str:
    """One Python source with all kernels."""
    return "\n\n".join([PRELUDE.strip(), *dict.fromkeys(function.text.rstrip() for function in functions)]) + "\n"


def load_kernels(functions: Iterable[TritonFunction]) -> list[Any]:
    """The kernels as Triton's jitted functions. Raises ``MissingExtraError`` without Triton."""
    found = list(functions)
    names = _load(print_module(found))
    return [names[function.name] for function in found]


@functools.cache
def _load(source: str) -> dict[str, Any]:
    if not has_triton():
        raise MissingExtraError("Triton is not installed", remedy="pip install 'effcc[triton]'")
    name = f"effcc_triton_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = f"<{name}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    names: dict[str, Any] = {"__name__": name, "__file__": path}
    exec(compile(source, path, "exec"), names)  # our own generated text
    return names


@functools.cache
def has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None
