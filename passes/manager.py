"""Runs passes over a graph. Verification, dumps and times all hang on one callback: (moment, pass, graph)."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from ..errors import EffccError, PassError
from ..ir.graph import Graph
from ..ir.printer import print_graph
from ..ir.verifier import verify
from ..logs import logger
from .dump import DumpFolder, PassRecord
from .pipeline import Pass, pass_text

DUMP_VARIABLE = "EFFCC_DUMP"

_log = logger("passes")


class Callback(Protocol):
    """Called before and after each pass, with the graph at that moment."""

    def __call__(self, moment: Literal["before", "after"], pass_: Pass, graph: Graph, /) -> None: ...


@dataclass
class PassManager:
    """An ordered list of passes and what watches them.

    ``dump_dir`` (or the variable ``EFFCC_DUMP``, or torch's debug folder) receives the dumps described in
    ``passes/dump.py``. ``records`` tells afterwards what each pass did. ``publish(name, text)`` receives the same dumps
    as they are made.
    """

    passes: Sequence[Pass]
    dump_dir: str | Path | None = None
    verify: bool = True
    callback: Callback | None = None
    publish: Callable[[str, Callable[[], str]], None] | None = None
    records: list[PassRecord] = field(default_factory=list)

    @property
    def directory(self) -> Path | None:
        """Where dumps go, None if nowhere."""
        found = self.dump_dir or os.environ.get(DUMP_VARIABLE) or _debug_directory()
        return Path(found) if found else None

    def run(self, graph: Graph) -> Graph:
        """The graph after all passes. Raises PassError, which tells how to repeat the failure, if one breaks."""
        directory = self.directory
        dump = _Dump(DumpFolder(directory) if directory else None, self.publish or _trace_to_torch)
        dump.begin(graph)
        if self.verify:
            verify(graph)
        for pass_ in self.passes:
            graph = self._run_one(pass_, graph, dump)
        return graph

    def _run_one(self, pass_: Pass, graph: Graph, dump: _Dump) -> Graph:
        if self.callback:
            self.callback("before", pass_, graph)
        begin = time.perf_counter()
        try:
            after = pass_.apply(graph)
            seconds = time.perf_counter() - begin
            changed = after is not graph and after != graph
            if changed and self.verify:
                verify(after)
        except Exception as error:
            seconds = time.perf_counter() - begin
            file, record = dump.failure(pass_, graph, seconds, error)
            self.records.append(record)
            raise _failure(pass_, graph, file, error) from error
        self.records.append(dump.success(pass_, graph, after, seconds, changed))
        sizes = f"{len(graph.nodes)} -> {len(after.nodes)} ops" if changed else "unchanged"
        _log.log(logging.INFO if changed else logging.DEBUG, "%s on %s: %s, %.1f ms",
                 pass_.name, graph.name, sizes, 1e3 * seconds)  # fmt: skip
        if self.callback:
            self.callback("after", pass_, after)
        return after


def _debug_directory() -> Path | None:
    """With ``TORCH_COMPILE_DEBUG=1``, where torch's compiler is loaded: a folder beside what Inductor writes."""
    if os.environ.get("TORCH_COMPILE_DEBUG") != "1" or "torch._inductor.config" not in sys.modules:
        return None
    from ..torch_internals import debug_directory

    return debug_directory() / "effcc"


class _Dump:
    """Writes one run into a folder, if there is one, and publishes it."""

    def __init__(self, folder: DumpFolder | None, publish: Callable[[str, Callable[[], str]], None]) -> None:
        self.folder, self.publish = folder, publish
        self.current = ""
        self.count = 0

    def begin(self, graph: Graph) -> None:
        self.publish(f"effcc_{graph.name}_input", lambda: print_graph(graph))
        if self.folder:
            index, stem = self.folder.claim("input")
            self.current = self.folder.write(f"{stem}.ir", print_graph(graph))
            size = len(graph.nodes)
            record = PassRecord(index, "input", graph.name, graph.phase, 0.0, True, size, size, "", self.current)
            self.folder.write_record(stem, record)

    def success(self, pass_: Pass, before: Graph, after: Graph, seconds: float, changed: bool) -> PassRecord:
        source, index, stem = self.current, self.count, ""
        if self.folder:
            index, stem = self.folder.claim(pass_.name)
            if changed:
                self.current = self.folder.write(f"{stem}.ir", print_graph(after))
        if changed:
            self.publish(f"effcc_{after.name}_{index:03d}_{pass_.name}", lambda: print_graph(after))
        record = _record(index, pass_, before, len(after.nodes), seconds, changed, (source, self.current))
        if self.folder:
            self.folder.write_record(stem, record)
        self.count += 1
        return record

    def failure(self, pass_: Pass, graph: Graph, seconds: float, error: Exception) -> tuple[Path, PassRecord]:
        """Saves the graph that the pass failed on (in a temporary folder if there is no other)."""
        folder = self.folder or DumpFolder(Path(tempfile.mkdtemp(prefix="effcc-")))
        index, stem = folder.claim(pass_.name)
        file = f"{stem}-failed.ir"
        command = repeat_command(pass_, folder.path / file)
        reason = "".join(f"#   {line}\n" for line in _reason(error).splitlines())
        folder.write(file, f"# {command}\n{reason}{print_graph(graph)}")
        record = _record(index, pass_, graph, len(graph.nodes), seconds, False, (file, ""), _reason(error))
        folder.write_record(stem, record)
        return folder.path / file, record


def _record(
    index: int,
    pass_: Pass,
    before: Graph,
    ops_after: int,
    seconds: float,
    changed: bool,
    files: tuple[str, str],
    failed: str = "",
) -> PassRecord:
    return PassRecord(
        index=index,
        text=pass_text(pass_),
        graph=before.name,
        phase=before.phase,
        seconds=seconds,
        changed=changed,
        ops_before=len(before.nodes),
        ops_after=ops_after,
        before=files[0],
        after=files[1],
        failed=failed,
    )


def repeat_command(pass_: Pass, file: Path) -> str:
    """The shell command that runs the pass on a saved graph again."""
    return shlex.join(["effcc", "opt", str(file), "-p", pass_text(pass_)])


def _failure(pass_: Pass, graph: Graph, file: Path, error: Exception) -> PassError:
    return PassError(
        f"pass {pass_.name} failed on graph {graph.name}: {_reason(error)}",
        where=error.where if isinstance(error, EffccError) else "",
        remedy=f"repeat it with: {repeat_command(pass_, file)}",
    )


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, EffccError) else f"{type(error).__name__}: {error}"


def _trace_to_torch(name: str, text: Callable[[], str]) -> None:
    """Dumps go to torch's structured trace too (``TORCH_TRACE``, tlparse) where torch's compiler is loaded."""
    if "torch._inductor.config" in sys.modules:
        from ..torch_internals import structured_trace

        structured_trace(name, text)
