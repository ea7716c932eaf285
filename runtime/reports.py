"""What was compiled and how it ran: one report per captured graph, kept for the life of the process."""

from __future__ import annotations

import functools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from ..ir.graph import Graph
from ..ir.plan import Plan
from ..passes.activation.choice import ActivationChoice


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


@dataclass(frozen=True)
class CascadeReport:
    """A fused cascade: memory traffic in bytes as written and fused, the certificates of its rewriting as text, and the
    C++ of its kernel."""

    name: str
    source: str
    bytes_written: int
    bytes_fused: int
    certificates: tuple[str, ...]
    kernel: str


@dataclass(repr=False)
class GraphReport:
    """``seconds`` are those of the runs so far (last 100). ``make_plan`` gives the plan of the step that the graph
    belongs to (forward and backward share one)."""

    name: str
    phase: str
    regions: list[RegionReport] = field(default_factory=list)
    fallbacks: list[FallbackReport] = field(default_factory=list)
    #: The most bytes held during the first run: the step's inputs (parameters among them) and what the graph allocates.
    measured_peak: int | None = None
    started: bool = False
    #: From the captured graph to its host module, and what the first run then waited for kernels.
    compile_seconds: float = 0.0
    wait_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    #: What was fused in the step (forward and backward), and why other candidates were not.
    cascades: list[CascadeReport] = field(default_factory=list)
    not_fused: list[str] = field(default_factory=list)
    host_source: str = ""
    #: What was kept, recomputed and swapped, where a memory budget was given.
    activation: ActivationChoice | None = None
    make_plan: Callable[[], Plan | None] = lambda: None
    make_graph: Callable[[], Graph | None] = lambda: None
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    runs: int = 0

    @functools.cached_property
    def plan(self) -> Plan | None:
        """The plan of the whole step, made when it is first asked for; None for a graph that the IR cannot carry."""
        return self.make_plan()

    @functools.cached_property
    def graph(self) -> Graph | None:
        """The graph after all passes; None when it could not be brought into the IR."""
        return self.make_graph()

    @property
    def predicted_seconds(self) -> float | None:
        """Predicted time of this graph's steps."""
        if self.plan is None:
            return None
        return sum(step.seconds for step in self.plan.steps if step.phase == self.phase)

    @property
    def predicted_peak(self) -> int | None:
        """Predicted peak of the whole step in bytes, parameters and inputs included."""
        return self.plan.peak.get("device", 0) if self.plan is not None else None

    def __repr__(self) -> str:
        parts = [f"{len(self.regions)} regions", f"{self.kernels} kernels"]
        if self.cascades:
            parts.append(f"{len(self.cascades)} cascades")
        parts.append(f"{len(self.fallbacks)} fallbacks")
        if self.measured_peak is not None:
            parts.append(f"peak {self.measured_peak / 2**20:.3g} MiB")
        return f"<GraphReport {self.name} ({self.phase}): {', '.join(parts)}, {self.runs} runs>"

    def _repr_html_(self) -> str:
        return _table([self])

    def fall_back(self, op: str, reason: str, source: str, function: str = "") -> None:
        """Enter what runs as eager ops, and tell the user the first time that a reason comes up. ``function`` is the
        host module's name of a region that has lost its kernels."""
        self.regions = [
            replace(region, kernels=0) if f"_{region.name}" == function else region for region in self.regions
        ]
        self.fallbacks.append(FallbackReport(op, reason, source))
        warnings.warn(
            f"effcc: {op} of {self.name} run as eager ops: {reason} (all of them are in effcc.reports())",
            RuntimeWarning,
            stacklevel=2,
        )

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


class Reports(list[GraphReport]):
    """A list of reports that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        return _table(self)


def _table(reports: Sequence[GraphReport]) -> str:
    """One row a graph, and below it what fell back."""
    head = ("graph", "phase", "regions", "kernels", "fallbacks", "runs", "median time", "peak of the first run")
    rows = []
    for report in reports:
        seconds, peak = report.measured_seconds, report.measured_peak
        cells = (
            report.name, report.phase, len(report.regions), report.kernels, len(report.fallbacks), report.runs,
            "" if seconds is None else f"{1e3 * seconds:.3g} ms", "" if peak is None else f"{peak / 2**20:.3g} MiB",
        )  # fmt: skip
        rows.append("".join(f"<td>{escape(str(cell))}</td>" for cell in cells))
        rows += [
            f'<td></td><td colspan="{len(head) - 1}">{escape(f"{row.op}: {row.reason} ({row.source})")}</td>'
            for row in report.fallbacks
        ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{body}</table>"


_reports: list[GraphReport] = []
_lock = threading.Lock()
#: A long-lived process that recompiles often keeps this many of the newest.
LIMIT = 1000


def add_report(report: GraphReport) -> None:
    with _lock:
        _reports.append(report)
        del _reports[:-LIMIT]


def reports() -> Reports:
    """The reports of all graphs compiled in this process, oldest first."""
    with _lock:
        return Reports(_reports)


def forget(names: Collection[str]) -> None:
    """Drop the reports of graphs that were compiled and then replaced."""
    with _lock:
        _reports[:] = [report for report in _reports if report.name not in names]


def reset() -> None:
    """Forget all reports."""
    with _lock:
        _reports.clear()
