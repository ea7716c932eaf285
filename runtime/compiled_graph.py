"""A compiled graph: the host module with its regions, called with boxed arguments."""

from __future__ import annotations

import linecache
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from . import scratch
from .peak_meter import PeakMeter
from .reports import GraphReport


class CompiledGraph:
    """Runs one captured graph. Takes a list of arguments and clears it; returns the list of outputs."""

    def __init__(
        self,
        source: str,
        namespace: Mapping[str, Any],
        report: GraphReport,
        meter: PeakMeter,
        finish: Callable[[], None] | None = None,
    ) -> None:
        # AOTAutograd then hands the arguments over in a list that may be emptied while the graph runs. It is an
        # attribute of the instance because ``functools.wraps`` copies only those.
        self._boxed_call = True
        self.source = source
        self.report = report
        self.run = load_host_module(source, namespace, f"<effcc {report.name}>")
        self.meter = meter
        self.finish = finish
        self.lock = threading.Lock()
        self.kept: list[Any] = []

    def __call__(self, args: list[Any]) -> Any:
        if self.finish is not None:
            with self.lock:  # another thread may be here for the first time, too
                if self.finish is not None:
                    self.finish()
                    self.finish = None
        first, self.report.started = not self.report.started, True
        begin = time.perf_counter()
        try:
            if first:
                outputs, self.report.measured_peak = self.meter.run(self.run, args)
            else:
                outputs = self.run(args)
        finally:
            # Between graphs the memory may be wanted by the loss or the optimizer.
            scratch.release()
        self.report.record(time.perf_counter() - begin)
        return outputs

    def replace(self, region: str, run: Callable[[list[Any]], Any]) -> None:
        """Let the host module call ``run`` for the function ``region``. What it called before is kept alive: it may own
        the code that ``run`` was made from."""
        scope = self.run.__globals__
        self.kept.append(scope[region])
        scope[region] = run

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledGraph:
        return self

    def __repr__(self) -> str:
        return f"CompiledGraph({self.report.name}, {len(self.report.regions)} regions)"


def load_host_module(source: str, namespace: Mapping[str, Any], filename: str) -> Callable[[list[Any]], Any]:
    """The ``run`` function of a host module that this process has just generated; tracebacks show its lines."""
    scope = dict(namespace)
    exec(compile(source, filename, "exec"), scope)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    run: Callable[[list[Any]], Any] = scope["run"]
    return run
