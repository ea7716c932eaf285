"""Reading a folder of dumps, or a plan, as a sequence of stages; following one value through them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import OptionError
from .formatting import bytes_text, seconds_text
from .ir.plan import Plan
from .ir.plan_file import load_plan
from .passes.dump import PassRecord, read_records


@dataclass(frozen=True)
class Stage:
    """A graph at one moment. ``file`` is empty where the pass changed nothing (its text is then the one before)."""

    index: int
    label: str
    graph: str
    phase: str
    ops: int
    text: Callable[[], str]
    file: str = ""
    seconds: float = 0.0
    changed: bool = True
    failed: str = ""

    @property
    def name(self) -> str:
        return self.label.partition("{")[0]


@dataclass(frozen=True)
class Dump:
    """What was opened: stages in order, and the plan if it was one."""

    path: Path
    stages: tuple[Stage, ...]
    plan: Plan | None = None


@dataclass(frozen=True)
class Event:
    """What happened to a value at a stage, with the lines that show it."""

    stage: str
    what: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class History:
    """A value's way from the model's source line through every pass to its step and its address."""

    name: str
    source: str
    events: tuple[Event, ...]


def open_dump(path: Path) -> Dump:
    """The stages of a dump folder or of a plan file. Raises OptionError or PlanError."""
    if path.is_dir():
        stages = tuple(_stage(path, record) for record in read_records(path))
        if not stages:
            raise OptionError(
                f"{path} holds no dumps", remedy="run with EFFCC_DUMP=folder, or give the path of a plan file"
            )
        return Dump(path, stages)
    loaded = load_plan(path)
    graphs = enumerate(loaded.graphs_text.items())
    planned = [_text_stage(index, name, text, f"{name} (planned)") for index, (name, text) in graphs]
    sources = enumerate(sorted(loaded.sources.items()), start=len(planned))
    generated = [_text_stage(index, name, text, name) for index, (name, text) in sources]
    return Dump(path, (*planned, *generated), loaded.plan)


def _stage(folder: Path, record: PassRecord) -> Stage:
    file = record.after or record.before

    def text() -> str:
        if not file:
            raise OptionError(f"stage {record.index} has no text", where=str(folder))
        try:
            return (folder / Path(file).name).read_text(encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot read {folder / file}: {error.strerror}") from error

    return Stage(
        index=record.index,
        label=record.text,
        graph=record.graph,
        phase=record.phase,
        ops=record.ops_after,
        text=text,
        file=record.after if record.changed else "",
        seconds=record.seconds,
        changed=record.changed,
        failed=record.failed,
    )


def _text_stage(index: int, name: str, text: str, label: str) -> Stage:
    phase = re.search(r"phase=(\w+)", text)
    ops = len(re.findall(r"^\s*%", text, re.MULTILINE))
    return Stage(index, label, name, phase[1] if phase else "", ops, lambda: text, file=name)


def node_history(dump: Dump, name: str) -> History:
    """Every stage at which value ``%name`` appears, changes or goes; then its step and buffer in the plan."""
    events: list[Event] = []
    source = ""
    last: dict[str, str] = {}
    for stage in dump.stages:
        if not stage.changed or stage.failed or stage.file.endswith((".py", ".cpp")):
            continue
        lines = stage.text().splitlines()
        line = next((text.strip() for text in lines if _defines(text, name)), "")
        label = f"{stage.index:03d} {stage.label} ({stage.graph})"
        before = last.get(stage.graph, "")
        if line and not before:
            readers = tuple(text.strip() for text in lines if _mentions(text, name) and not _defines(text, name))
            events.append(Event(label, f"appears, read by {len(readers)}", (line, *(f"  {r}" for r in readers[:8]))))
        elif line and line != before:
            events.append(Event(label, "changes", (f"- {before}", f"+ {line}")))
        elif before and not line:
            heirs = tuple(text.strip() for text in lines if re.search(rf'from\(".*%?{re.escape(name)}\b', text))
            events.append(Event(label, "goes", (f"- {before}", *heirs[:8])))
        last[stage.graph] = line
        if line and not source:
            source = _location(line)
    if dump.plan is not None:
        events += _plan_events(dump, dump.plan, name)
    return History(name, source, tuple(events))


def _plan_events(dump: Dump, plan: Plan, name: str) -> list[Event]:
    """Steps that cover the op and buffers that hold its value."""
    events = []
    order = {
        found[1]: position
        for stage in dump.stages
        for position, found in enumerate(re.finditer(r"^\s*%([\w.]+)", stage.text(), re.MULTILINE))
    }
    for step in plan.steps:
        covered = name in step.ops
        if len(step.ops) >= 2 and name in order and step.ops[0] in order and step.ops[1] in order:
            covered = covered or order[step.ops[0]] <= order[name] <= order[step.ops[1]]
        if covered:
            what = f"{step.kind} {step.name}, {step.phase}, {seconds_text(step.seconds)}"
            events.append(Event(f"step {step.id}", what))
    for buffer in plan.buffers:
        if buffer.name == name:
            place = f"{buffer.tier}, not placed" if buffer.offset is None else f"{buffer.arena_key} + {buffer.offset}"
            what = f"{bytes_text(buffer.bytes)} at {place}, steps {buffer.lower} to {buffer.upper}, {buffer.decision}"
            events.append(Event(f"buffer {buffer.id}", f"{buffer.role}: {what}"))
    return events


def _defines(line: str, name: str) -> bool:
    return re.match(rf"\s*%{re.escape(name)}(?::| =)", line) is not None


def _mentions(line: str, name: str) -> bool:
    return re.search(rf"%{re.escape(name)}(?![\w.])", line) is not None


def _location(line: str) -> str:
    """The inside of ``loc(...)``, which may hold brackets and quotes of its own."""
    start = line.find("loc(")
    if start < 0:
        return ""
    depth, quoted, position = 0, False, start + 3
    while position < len(line):
        character = line[position]
        if character == "\\" and quoted:
            position += 1
        elif character == '"':
            quoted = not quoted
        elif not quoted:
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return line[start + 4 : position]
        position += 1
    return line[start + 4 :]
