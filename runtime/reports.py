"""What was compiled and how it ran: one report per captured graph, kept for the life of the process."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from ..ir.graph import Graph


@dataclass(frozen=True)
class RegionReport:
    """One region of a graph: how often it is called, its ops and kernels, its library choices."""

    name: str
    kind: str
    calls: int
    ops: int
    kernels: int
    library: dict[str, str]
    source: str


@dataclass(frozen=True)
class FallbackReport:
    op: str
    reason: str
    source: str


@dataclass
class GraphReport:
    """``seconds`` are those of the runs so far (last 100); ``predicted_*`` come from the plan, 0 when there is none."""

    name: str
    phase: str
    regions: list[RegionReport] = field(default_factory=list)
    fallbacks: list[FallbackReport] = field(default_factory=list)
    predicted_seconds: float = 0.0
    predicted_peak: int = 0
    measured_peak: int | None = None
    compile_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    #: The graph after all passes; None when it could not be brought into the IR.
    graph: Graph | None = None
    host_source: str = ""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    runs: int = 0

    def record(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.runs += 1

    @property
    def measured_seconds(self) -> float | None:
        """Median of the recorded runs, None before the first."""
        if not self.seconds:
            return None
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 2]

    @property
    def kernels(self) -> int:
        return sum(region.kernels for region in self.regions)


_reports: list[GraphReport] = []
_lock = threading.Lock()
#: A long-lived process that recompiles often keeps this many of the newest.
LIMIT = 1000


def add_report(report: GraphReport) -> None:
    with _lock:
        _reports.append(report)
        del _reports[:-LIMIT]


def reports() -> list[GraphReport]:
    """The reports of all graphs compiled in this process, oldest first."""
    with _lock:
        return list(_reports)


def reset() -> None:
    """Forget all reports."""
    with _lock:
        _reports.clear()
