"""Inductor's code cache: keys, what is kept there, where it lies."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config

from .compiling import compile_error_cause


def code_key(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Inductor's cache key of a graph (structure, constants, input layouts, settings, versions, machine); None when its
    code cache is off or does not take the graph."""
    from torch._inductor.codecache import FxGraphCache, FxGraphCachePickler

    if not inductor_config.fx_graph_cache or inductor_config.force_disable_caches:
        return None
    _remember_source_keys()
    plain = FxGraphCachePickler.debug_lines
    FxGraphCachePickler.debug_lines = lambda *_: []  # a second hash of every part, for its log
    try:
        found, _ = FxGraphCache.prepare_key(gm, list(example_inputs), dict(kwargs), [], False)
    finally:
        FxGraphCachePickler.debug_lines = plain
    return found[0] if found is not None else None


class _NotCachedError(Exception):
    pass


def load_region(key: str, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """A region that was compiled before, by its key in Inductor's code cache; None when it is not there. ``gm`` is any
    graph that has ops: it is not looked at."""
    from torch._inductor import compile_fx as module
    from torch._inductor.codecache import FxGraphCache

    def refuse(*_: Any, **__: Any) -> Any:
        raise _NotCachedError

    prepare, generate = FxGraphCache.prepare_key, module.fx_codegen_and_compile
    FxGraphCache.prepare_key = staticmethod(lambda *_, **__: ((key, []), {}))
    module.fx_codegen_and_compile = refuse
    try:
        return module.compile_fx_inner(gm, list(example_inputs), **kwargs)
    except Exception as error:
        if isinstance(compile_error_cause(error), _NotCachedError | OSError):
            return None
        raise
    finally:
        FxGraphCache.prepare_key, module.fx_codegen_and_compile = staticmethod(prepare), generate


def code_cache_path() -> Path:
    """The directory of Inductor's code cache, as set now."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


@contextlib.contextmanager
def remembered_toolchain() -> Iterator[None]:
    """Inside, two questions about the C++ toolchain that Inductor asks in each process are answered from its cache
    directory: whether a probe of each vector instruction set loads (a child process each), and which precompiled
    header is that of torch's header (it preprocesses that to learn so). Torch, compiler and command line are in the
    keys."""
    from torch._inductor import codecache
    from torch._inductor.cpu_vec_isa import VecISA

    probe: Any = getattr(VecISA, "_probe_load", None)  # neither is in torch 2.11
    precompile: Any = getattr(codecache, "_precompile_header", None)

    def probe_load(self: Any, output_path: str) -> bool:
        marker = Path(f"{output_path}.loads")
        found = marker.exists() or bool(probe(self, output_path))
        if found:
            _note(marker, "")
        return found

    def precompile_header(header: str, hashable_cmd_line: str, **command: Any) -> str:
        from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

        parts = (header, hashable_cmd_line, torch.__version__, get_compiler_version_info(get_cpp_compiler()))
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        note = Path(codecache.get_lock_dir()).parent / "effcc" / f"header-{digest}"
        with contextlib.suppress(OSError):
            path = note.read_text()
            if any(Path(path + suffix).exists() for suffix in (".gch", ".pch")):
                return path
        path = str(precompile(header, hashable_cmd_line, **command))
        _note(note, path)
        return path

    with contextlib.ExitStack() as stack:
        for owner, name, plain, ours in (
            (VecISA, "_probe_load", probe, probe_load),
            (codecache, "_precompile_header", precompile, precompile_header),
        ):
            if plain is not None:
                setattr(owner, name, ours)
                stack.callback(setattr, owner, name, plain)
        yield


@functools.cache
def _remember_source_keys() -> None:
    """Take the hashes of torch's and triton's own files, parts of every ``code_key``, from the cache directory while
    those files are what they were, by size and time of writing. (To read and hash them again takes half a second.)"""
    from torch._inductor import codecache

    for name, module in (("torch_key", "torch"), ("triton_key", "triton")):
        key: Any = getattr(codecache, name, None)
        found = importlib.util.find_spec(module)
        if not hasattr(key, "set") or found is None or found.origin is None:  # torch before 2.13; no triton
            continue
        stamp = _stamp(os.path.dirname(found.origin), torch.__version__)
        note = Path(codecache.get_lock_dir()).parent / "effcc" / f"{name}-{stamp}"
        try:
            kept: str | bytes = note.read_text()
        except OSError:
            known = key()
            if known is not None:
                _note(note, known.hex() if isinstance(known, bytes) else known)
            continue
        if name == "torch_key":
            kept = bytes.fromhex(kept)
        with contextlib.suppress(RuntimeError):  # worked out by somebody else meanwhile
            key.set(kept)


def _stamp(root: str, *more: str) -> str:
    """A digest of the paths, sizes and times of all files below ``root``, bytecode apart."""
    found, folders = [], [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in ("__pycache__", "include"):
                        folders.append(entry.path)
                else:
                    facts = entry.stat()
                    found.append((entry.path, facts.st_size, facts.st_mtime_ns))
    return hashlib.sha256(repr((sorted(found), more)).encode()).hexdigest()


def _note(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written remembers nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(text)
        part.replace(path)
