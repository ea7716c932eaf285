"""A folder of dumps, or a plan, as a sequence of stages: a graph at one moment each."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import EffccError, OptionError
from ..ir.graph import Graph
from ..ir.parser import parse_graph
from ..ir.plan import Plan
from ..ir.plan_file import PlanFile, load_plan
from ..passes.dump import PassRecord, read_records

#: Folder of dumps that is looked for beside a plan.
DUMPS_BESIDE = "passes"
_CODE = (".py", ".cpp")


@dataclass(frozen=True, eq=False)
class Stage:
    """A graph at one moment, or generated code. ``file`` is empty where the pass changed nothing (its text is then the
    one before). ``ops`` and ``ops_before`` count the outermost graph's nodes."""

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
    ops_before: int = 0

    @property
    def name(self) -> str:
        return self.label.partition("{")[0]

    @property
    def is_code(self) -> bool:
        """Whether it is generated code, not a graph."""
        return self.file.endswith(_CODE)

    @property
    def begins(self) -> bool:
        """Whether it is a graph before its first pass."""
        return self.label == "input"

    @functools.cached_property
    def parsed(self) -> Graph | None:
        """The graph; None for generated code and for text that is no graph."""
        if self.is_code:
            return None
        try:
            return parse_graph(self.text(), self.label)
        except EffccError:
            return None


@dataclass(frozen=True, eq=False)
class Dump:
    """What was opened: stages in order, and the plan if it was one."""

    path: Path
    stages: tuple[Stage, ...]
    plan: Plan | None = None
    loaded: PlanFile | None = None

    def chains(self) -> dict[str, list[Stage]]:
        """Of each graph the stages at which it was another, from its latest capture to the plan."""
        found: dict[str, list[Stage]] = {}
        for stage in self.stages:
            if stage.is_code or stage.failed or not (stage.changed or stage.begins):
                continue
            if stage.begins:
                found[stage.graph] = []
            found.setdefault(stage.graph, []).append(stage)
        return found

    def last(self) -> dict[str, Stage]:
        """Each graph as it was in the end."""
        return {name: stages[-1] for name, stages in self.chains().items()}


def open_dump(path: Path, dumps: Path | None = None) -> Dump:
    """The stages of a dump folder, or of a plan file with the dumps of its passes before it.

    Those are read from ``dumps``, else from the folder ``passes`` beside the plan, if it holds this plan's graphs.
    Raises OptionError or PlanError.
    """
    if path.is_dir():
        stages = tuple(_stage(path, record) for record in read_records(path))
        if not stages:
            raise OptionError(
                f"{path} holds no dumps", remedy="run with EFFCC_DUMP=folder, or give the path of a plan file"
            )
        return Dump(path, stages)
    loaded = load_plan(path)
    return plan_dump(path, loaded, dumps)


def graphs_of(loaded: PlanFile) -> list[Graph]:
    """The graphs of a plan; texts that are none are left out, for what reads plans reads any that is sound."""
    found = []
    for text in loaded.graphs_text.values():
        try:
            found.append(parse_graph(text))
        except EffccError:
            continue
    return found


def plan_dump(path: Path, loaded: PlanFile, dumps: Path | None = None) -> Dump:
    """``open_dump`` for a plan that is loaded already."""
    folder = dumps if dumps is not None else dumps_beside(path, loaded)
    before = open_dump(folder).stages if folder is not None else ()
    start = max((stage.index for stage in before), default=-1) + 1
    graphs = enumerate(loaded.graphs_text.items(), start=start)
    planned = [_text_stage(index, name, text, f"{name} (planned)") for index, (name, text) in graphs]
    sources = enumerate(sorted(loaded.sources.items()), start=start + len(planned))
    generated = [_text_stage(index, name, text, name) for index, (name, text) in sources]
    return Dump(path, (*before, *planned, *generated), loaded.plan, loaded)


def dumps_beside(path: Path, loaded: PlanFile) -> Path | None:
    """The folder ``passes`` beside a plan, where its dumps end in this plan's graphs."""
    folder = path.parent / DUMPS_BESIDE
    if not folder.is_dir() or not loaded.graphs_text:
        return None
    last = Dump(folder, tuple(_stage(folder, record) for record in read_records(folder))).last()
    for name, text in loaded.graphs_text.items():
        try:
            if name not in last or list(defined(last[name].text())) != list(defined(text)):
                return None
        except OptionError:  # a file of the folder is gone
            return None
    return folder


def _stage(folder: Path, record: PassRecord) -> Stage:
    file = record.after or record.before

    def text() -> str:
        if not file:
            raise OptionError(f"stage {record.index} has no text", where=str(folder))
        try:
            return (folder / Path(file).name).read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise OptionError(f"cannot read {folder / file}: {error.strerror}") from error

    return Stage(
        index=record.index,
        label=record.text,
        graph=record.graph,
        phase=record.phase,
        ops=record.ops_after,
        text=functools.cache(text),
        file=record.after if record.changed else "",
        seconds=record.seconds,
        changed=record.changed,
        failed=record.failed,
        ops_before=record.ops_before,
    )


def _text_stage(index: int, name: str, text: str, label: str) -> Stage:
    phase = re.search(r"phase=(\w+)", text)
    outer = [line for line in text.splitlines() if line.startswith("  %")]
    return Stage(index, label, name, phase[1] if phase else "", len(outer), lambda: text, name, ops_before=len(outer))


def defined(text: str) -> Iterator[str]:
    """Names that an IR text defines, in order, those of subgraphs too."""
    return (match[1] for match in re.finditer(r"^\s*%([\w.]+|\"(?:[^\"\\]|\\.)*\")(?::| =)", text, re.MULTILINE))


def only(dump: Dump, graph: str) -> Dump:
    """The stages of one graph. Raises OptionError with the graphs that there are."""
    stages = tuple(stage for stage in dump.stages if stage.graph == graph)
    if not stages:
        names = sorted({stage.graph for stage in dump.stages})
        raise OptionError(f"there is no graph {graph!r} in {dump.path}", remedy=f"graphs: {', '.join(names)}")
    return replace(dump, stages=stages)


def find_stage(dump: Dump, key: str) -> Stage:
    """The stage with that number, else the last with that pass name or file. Raises OptionError with what there is."""
    import difflib

    if key.isdigit():
        for stage in dump.stages:
            if stage.index == int(key):
                return stage
    for stage in reversed(dump.stages):
        if key in (stage.label, stage.name, stage.file):
            return stage
    names = [stage.name for stage in dump.stages]
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    there = ", ".join(f"{stage.index} {stage.name}" for stage in dump.stages)
    raise OptionError(f"there is no stage {key!r} in {dump.path}", remedy=f"{hint}stages: {there}")
