"""What source, IR and plan say of each other: from a line of one to the places in the others."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..formatting import bytes_text, seconds_text
from ..ir.graph import Graph
from ..ir.plan import Buffer, Plan, Step
from ..summary import holders, live_at, module_class, peak_position
from .lineage import Place
from .model_source import SourceFile, model_source
from .residence import PlannedGraph
from .search import find
from .stages import Dump, Stage

_OPEN = re.compile(r'\s*graph @("(?:[^"\\]|\\.)*"|\S+)(?: as @("(?:[^"\\]|\\.)*"|\S+))?')
_DEFINES = re.compile(r'\s*%("(?:[^"\\]|\\.)*"|[\w.]+)(?::| =)')
_LOCATION = re.compile(
    r'  loc\((?:(?P<file>"(?:[^"\\]|\\.)*"|[^\s:"]*):(?P<line>\d+))?\s?'
    r'(?:"(?:[^"\\]|\\.)*")?\s?(?:in (?P<module>[^)]*))?\)'
)
#: Rows of the plan shown at once.
ROWS = 400

_Item = TypeVar("_Item", Buffer, Step)


@dataclass(frozen=True)
class IrLine:
    """A line of an IR text: the value it defines in its scope (``""`` for others), and where that comes from."""

    text: str
    scope: str = ""
    name: str = ""
    file: str = ""
    line: int = 0
    module: str = ""


@dataclass(frozen=True)
class PlanRow:
    """A row of the plan. ``ops`` of ``graph`` and the ``source`` (``model.py:88``) are what it leads to."""

    kind: str
    text: str
    graph: str = ""
    ops: tuple[str, ...] = ()
    source: str = ""


def ir_lines(text: str) -> list[IrLine]:
    """The lines of an IR text without their ``loc(...)``, which stands in the fields."""
    found: list[IrLine] = []
    stack: list[str] = []
    for raw in text.splitlines():
        if opened := _OPEN.match(raw):
            key = (opened[2] or opened[1]).strip('"')
            stack.append("" if not stack else f"{stack[-1]}/{key}".lstrip("/"))
            found.append(IrLine(raw, stack[-1]))
            continue
        where = _LOCATION.search(raw)
        shown = raw[: where.start()] + raw[where.end() :] if where else raw
        scope = stack[-1] if stack else ""
        defines = _DEFINES.match(raw)
        found.append(
            IrLine(
                shown,
                scope,
                defines[1].strip('"') if defines else "",
                (where["file"] or "").strip('"') if where else "",
                int(where["line"] or 0) if where else 0,
                (where["module"] or "").strip('"') if where else "",
            )
        )
        if raw.strip() == "}" and stack:
            stack.pop()
    return found


def without_places(text: str) -> str:
    """An IR text without its ``loc(...)``, which two columns have no room for."""
    return "\n".join(line.text for line in ir_lines(text))


@dataclass(eq=False)
class Links:
    """Everything that a dump's three views show."""

    dump: Dump

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """What can be shown as IR or code: a pass that changed nothing is left out."""
        return [stage for stage in self.dump.stages if (stage.changed or stage.is_code) and not stage.failed]

    @functools.cached_property
    def files(self) -> list[SourceFile]:
        last = [stage.parsed for stage in self.dump.last().values()]
        graphs: list[Graph] = [graph for graph in last if graph is not None]
        return model_source(graphs, [self.dump.path.parent])

    @functools.cached_property
    def planned(self) -> dict[str, PlannedGraph]:
        """Of a plan: its graphs, by name."""
        if self.dump.plan is None:
            return {}
        last = self.dump.last()
        found = {}
        for entry in self.dump.plan.graphs:
            graph = last[entry.name].parsed if entry.name in last else None
            if graph is not None:
                found[entry.name] = PlannedGraph(self.dump.plan, entry.name, graph)
        return found

    def lines(self, stage: Stage) -> list[IrLine]:
        if stage.is_code:
            return [IrLine(line) for line in stage.text().splitlines()]
        return ir_lines(stage.text())

    def last_stage(self, graph: str) -> Stage | None:
        return self.dump.last().get(graph)

    def file_of(self, path: str) -> SourceFile | None:
        """The file at that path, or with that base name."""
        by_name = [file for file in self.files if os.path.basename(file.path) == os.path.basename(path)]
        return next((file for file in self.files if file.path == path), by_name[0] if by_name else None)

    # --- rows of the plan ---------------------------------------------------------------------------------------------

    def at_peak(self) -> list[PlanRow]:
        """What holds the peak and what takes the time, where nothing is chosen."""
        plan = self.dump.plan
        if plan is None:
            return [PlanRow("note", "no plan: open a plan.effcc, --dumps names the folder of its passes")]
        held = live_at(plan, peak_position(plan))
        rows = [PlanRow("note", f"peak {bytes_text(sum(buffer.bytes for buffer in held))}, held by")]
        first = {(buffer.role, module_class(buffer.module)): buffer for buffer in reversed(held)}
        for holder in holders(held)[:40]:
            count = f"{holder.count} x " if holder.count > 1 else ""
            buffer = first.get((holder.role, holder.place))
            text = f"{bytes_text(holder.bytes):>10}  {count}{holder.role} {holder.what}"
            rows.append(self._row("buffer", text, buffer) if buffer is not None else PlanRow("buffer", text))
        rows.append(PlanRow("note", f"time {seconds_text(plan.seconds)}, longest steps"))
        longest = sorted((step for step in plan.steps if step.kind != "free"), key=lambda step: -step.seconds)
        return rows + [self._step(step) for step in longest[:40]]

    def of_value(self, graph: str, place: Place) -> list[PlanRow]:
        """Where a value of the planned graph lives."""
        planned = self.planned.get(graph)
        if planned is None:
            return [PlanRow("note", "no plan" if self.dump.plan is None else f"{graph} is not in the plan")]
        home = planned.residence(place)
        words = {
            "computed": f"%{place[1]} is computed by",
            "view": f"%{place[1]} is a view of %{home.owner}, computed by",
            "inside": f"%{place[1]} lives in registers of",
            "given": f"%{place[1]} is given",
            "unknown": f"%{place[1]} is not in the plan",
        }[home.how]
        rows = [PlanRow("note", words), *(self._step(step) for step in home.steps)]
        if home.buffers:
            rows.append(PlanRow("note", "held in" if home.how != "inside" else "which write"))
        return (rows + [self._buffer(buffer) for buffer in home.buffers])[:ROWS]

    def of_line(self, file: SourceFile, line: int) -> list[PlanRow]:
        """Time and memory of a source line."""
        plan = self.dump.plan
        if plan is None:
            return [PlanRow("note", "no plan")]
        place = f"{os.path.basename(file.path)}:{line}"
        steps, buffers = from_line(plan.steps, place), from_line(plan.buffers, place)
        position = peak_position(plan)
        held = sum(b.bytes for b in buffers if b.tier == "device" and b.lower <= position < b.upper)
        seconds = seconds_text(sum(step.seconds for step in steps))
        rows = [PlanRow("note", f"{place}: {seconds} in {len(steps)} steps, holds {bytes_text(held)} at the peak")]
        rows += [self._step(step) for step in sorted(steps, key=lambda step: -step.seconds)[: ROWS // 2]]
        buffers = sorted(buffers, key=lambda buffer: -buffer.bytes)
        return rows + [self._buffer(buffer) for buffer in buffers[: ROWS // 2]]

    def search(self, query: str) -> list[PlanRow]:
        """The values that a query finds, as rows that lead to them."""
        found = find(self.dump, query)[:ROWS]
        rows = [PlanRow("note", f"{len(found)} values fit {query!r}")]
        for each in found:
            size = bytes_text(each.bytes) if each.bytes else ""
            source = os.path.basename(each.source.partition(' "')[0])
            text = f"{size:>10}  {each.reference} {each.type} {each.op} {each.module}"
            rows.append(PlanRow("value", text, each.graph, (each.name,), source))
        return rows

    def _step(self, step: Step) -> PlanRow:
        where = f" in {step.module}" if step.module else ""
        text = f"step {step.id:>4}  {seconds_text(step.seconds):>8}  {step.phase} {step.kind} {step.name}{where}"
        return self._row("step", text, step, step.ops)

    def _buffer(self, buffer: Buffer) -> PlanRow:
        place = "not placed" if buffer.offset is None else f"{buffer.arena_key} + {buffer.offset}"
        where = f" in {buffer.module}" if buffer.module else ""
        text = (
            f"{bytes_text(buffer.bytes):>10}  %{buffer.name} {buffer.role}{where}, {place}, "
            f"steps {buffer.lower} to {buffer.upper}"
        )
        return self._row("buffer", text, buffer, (buffer.name.partition(".")[0],))

    def _row(self, kind: str, text: str, item: Buffer | Step, ops: tuple[str, ...] = ()) -> PlanRow:
        plan = self.dump.plan
        assert plan is not None
        position = item.lower if isinstance(item, Buffer) else item.id
        return PlanRow(kind, text, graph_at(plan, position), ops, item.source.partition(' "')[0])


def from_line(items: Sequence[_Item], place: str) -> list[_Item]:
    """What comes from the source line ``model.py:88``."""
    return [item for item in items if item.source.partition(' "')[0] == place]


def graph_at(plan: Plan, position: int) -> str:
    """The graph that runs at a position; the innermost where one encloses another."""
    ranges = sorted(plan.graphs, key=lambda entry: entry.last_step - entry.first_step)
    return next((entry.name for entry in ranges if entry.first_step <= position <= entry.last_step), "")
