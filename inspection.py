"""Reading a folder of dumps, or a plan, as a sequence of stages; following one value through them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import OptionError
from .formatting import bytes_text, seconds_text
from .ir.plan import Plan, Step
from .ir.plan_file import load_plan
from .passes.dump import PassRecord, read_records
from .summary import module_class


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
    """Every stage at which value ``%name`` appears, changes or goes; then its step and buffer in the plan.

    The bodies of subgraphs are scopes of their own: equal names in them are other values, told apart by ``in @body``.
    """
    events: list[Event] = []
    source = ""
    last: dict[str, dict[str, str]] = {}  # stage's graph -> scope -> line
    for stage in dump.stages:
        if not stage.changed or stage.failed or stage.file.endswith((".py", ".cpp")):
            continue
        scopes = _scopes(stage.text(), stage.graph)
        known = last.setdefault(stage.graph, {})
        label = f"{stage.index:03d} {stage.label}"
        for scope in dict.fromkeys([*scopes, *known]):
            lines = scopes.get(scope, {})
            event = _event(label, scope, name, known.get(scope, ""), lines)
            if event is not None:
                events.append(event)
            if name in lines:
                known[scope] = lines[name]
                source = source or _location(lines[name])
            else:
                known.pop(scope, None)
    if dump.plan is not None:
        events += _plan_events(dump, dump.plan, name)
    return History(name, source, tuple(events))


def _event(label: str, scope: str, name: str, before: str, lines: Mapping[str, str]) -> Event | None:
    """What happened to ``%name`` in one scope between its line ``before`` ("" if there was none) and ``lines``."""
    line = lines.get(name, "")
    if line == before:
        return None
    stage = f"{label} (in @{scope})"
    if not before:
        readers = [text for key, text in lines.items() if key != name and _mentions(text, name)]
        return Event(stage, f"appears, read by {len(readers)}", (line, *(f"  {text}" for text in readers[:8])))
    if line:
        return Event(stage, "changes", (f"- {before}", f"+ {line}"))
    heirs = [text for text in lines.values() if re.search(rf'from\(".*(?<![\w.]){re.escape(name)}(?![\w.])', text)]
    return Event(stage, "goes", (f"- {before}", *(f"+ {text}" for text in heirs[:8])))


def _scopes(text: str, graph: str) -> dict[str, dict[str, str]]:
    """The lines of each graph in an IR text, by the name they define: the outer graph's, and each subgraph's.

    The ``return`` of a graph stands under the name ``return``.
    """
    scopes: dict[str, dict[str, str]] = {}
    stack: list[str] = []
    for raw in text.splitlines():
        line = raw.strip()
        if opened := re.match(r'graph @("(?:[^"\\]|\\.)*"|\S+)', line):
            stack.append(opened[1].strip('"') if stack else graph)
            scopes[stack[-1]] = {}
        elif line == "}" and stack:
            stack.pop()
        elif stack and (defined := re.match(r"%([\w.]+)(?::| =)", line)):
            scopes[stack[-1]][defined[1]] = line
        elif stack and line.startswith("return"):
            scopes[stack[-1]]["return"] = line
    return scopes


def _plan_events(dump: Dump, plan: Plan, name: str) -> list[Event]:
    """Steps that cover the op and buffers that hold its value."""
    events = []
    scopes = {stage.graph: _scopes(stage.text(), stage.graph) for stage in dump.stages if stage.phase}
    # A graph's steps may lie around those of another graph: the shorter range is the inner one.
    graphs = sorted(plan.graphs, key=lambda graph: graph.last_step - graph.first_step)
    found: dict[str, list[int]] = {}
    for position, step in enumerate(plan.steps):
        graph = next((each.name for each in graphs if each.first_step <= position <= each.last_step), "")
        if any(_covers(step, name, list(lines)) for lines in scopes.get(graph, {}).values()):
            where = f" in {module_class(step.module)}" if step.module else ""
            what = f"{step.kind} {step.name}{where}, {step.phase}, {seconds_text(step.seconds)}"
            found.setdefault(what, []).append(step.id)
    for what, steps in found.items():
        events.append(Event(f"step {', '.join(map(str, steps))}", what))
    for buffer in plan.buffers:
        if buffer.name == name:
            place = f"{buffer.tier}, not placed" if buffer.offset is None else f"{buffer.arena_key} + {buffer.offset}"
            where = f" in {buffer.module}" if buffer.module else ""
            what = f"{bytes_text(buffer.bytes)} at {place}, steps {buffer.lower} to {buffer.upper}, {buffer.decision}"
            events.append(Event(f"buffer {buffer.id}", f"{buffer.role}{where}: {what}"))
    return events


def _covers(step: Step, name: str, order: Sequence[str]) -> bool:
    """Whether ``%name`` is the step's op, or lies between its first and last op in the order of its graph."""
    if name not in order:
        return False
    if name in step.ops[:2]:
        return True
    if len(step.ops) < 3 or step.ops[0] not in order or step.ops[1] not in order:
        return False
    first, last = order.index(step.ops[0]), order.index(step.ops[1])
    # Ops of other steps may stand between them; then only the ends are certain.
    return step.ops[2] == str(last - first + 1) and first <= order.index(name) <= last


def _mentions(line: str, name: str) -> bool:
    code = line.partition("  loc(")[0]  # the source text behind it is the user's
    return re.search(rf"%{re.escape(name)}(?![\w.])", code) is not None


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
