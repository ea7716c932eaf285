"""``effcc inspect``: what each pass did, and the whole history of one value."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from .cli_support import JsonOption, console, heading, print_json, table
from .errors import OptionError
from .formatting import seconds_text
from .inspection import Dump, Stage, node_history, open_dump


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A plan file (plan.effcc) or a folder of dumps (EFFCC_DUMP).")],
    show: Annotated[str | None, typer.Option("--show", help="Print one stage: its number or its pass's name.")] = None,
    diff: Annotated[
        tuple[str, str] | None, typer.Option("--diff", metavar="A B", help="Print what differs between two stages.")
    ] = None,
    node: Annotated[str | None, typer.Option("--node", help="The history of one value, such as %17.")] = None,
    graph: Annotated[str | None, typer.Option("--graph", help="Look at this graph only.")] = None,
    json: JsonOption = False,
) -> None:
    """List the passes of a plan or a dump folder, show one, compare two, or follow one value through all of them."""
    dump = open_dump(path)
    if graph is not None:
        dump = _only(dump, graph)
    if node is not None:
        _node(dump, node.removeprefix("%"), json)
    elif diff is not None:
        _diff(dump, *diff, json)
    elif show is not None:
        stage = find_stage(dump, show)
        if json:
            print_json({"stage": stage.label, "graph": stage.graph, "text": stage.text()})
        else:
            _print_ir(stage.text())
    else:
        _list(dump, json)


def find_stage(dump: Dump, key: str) -> Stage:
    """The stage with that number, else the last with that pass name or file. Raises OptionError with what there is."""
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
    raise OptionError(f"there is no stage {key!r} in {dump.path}", remedy=f"{hint}stages: {_stage_names(dump)}")


def _stage_names(dump: Dump) -> str:
    return ", ".join(f"{stage.index} {stage.name}" for stage in dump.stages)


def _only(dump: Dump, graph: str) -> Dump:
    stages = tuple(stage for stage in dump.stages if stage.graph == graph)
    if not stages:
        names = sorted({stage.graph for stage in dump.stages})
        raise OptionError(f"there is no graph {graph!r} in {dump.path}", remedy=f"graphs: {', '.join(names)}")
    return Dump(dump.path, stages, dump.plan)


def _list(dump: Dump, json: bool) -> None:
    if json:
        rows = [
            {
                "index": stage.index,
                "name": stage.name,
                "text": stage.label,
                "graph": stage.graph,
                "phase": stage.phase,
                "seconds": stage.seconds,
                "changed": stage.changed,
                "ops": stage.ops,
                "file": stage.file,
                "failed": stage.failed,
            }
            for stage in dump.stages
        ]
        print_json({"path": str(dump.path), "stages": rows})
        return
    rows_table = table("#", "pass", "graph", "phase", "ops", "time", "result", right=("#", "ops", "time"))
    for stage in dump.stages:
        result = f"failed: {stage.failed.splitlines()[0]}" if stage.failed else stage.file or "unchanged"
        seconds = seconds_text(stage.seconds) if stage.seconds else ""
        rows_table.add_row(
            str(stage.index), stage.label, stage.graph, stage.phase, str(stage.ops), seconds, result,
            style="red" if stage.failed else None,
        )  # fmt: skip
    out = console()
    out.print(rows_table)
    out.print("--show N prints one, --diff A B compares two, --node %name follows one value")


def _diff(dump: Dump, left: str, right: str, json: bool) -> None:
    from .cli_opt import text_diff

    one, other = find_stage(dump, left), find_stage(dump, right)
    names = f"{one.index} {one.name}", f"{other.index} {other.name}"
    text = text_diff(one.text(), other.text(), *names)
    if json:
        print_json({"left": names[0], "right": names[1], "diff": text})
        return
    out = console()
    if not text:
        out.print("the two are equal")
    for line in text.splitlines():
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        out.print(line, style=style, markup=False)


def _node(dump: Dump, name: str, json: bool) -> None:
    history = node_history(dump, name)
    if not history.events:
        raise OptionError(f"there is no value %{name} in {dump.path}", remedy="names are as in the IR: --show 0")
    if json:
        print_json(history)
        return
    out = console()
    if history.source:
        heading(out, f"%{name}", f" comes from {history.source}")
    else:
        heading(out, f"%{name}", ": no source line is known")
    for event in history.events:
        heading(out, f"\n{event.stage}", f"  {event.what}")
        for line in event.lines:
            out.print(f"    {line}", markup=False)


def _print_ir(text: str) -> None:
    out = console()
    if not out.is_terminal:
        print(text, end="" if text.endswith("\n") else "\n")
        return
    from rich.text import Text

    for line in text.splitlines():
        coloured = Text(line, no_wrap=True)
        coloured.highlight_regex(r"loc\(.*$", "dim")
        coloured.highlight_regex(r"%[\w.]+", "cyan")
        coloured.highlight_regex(r"(?<== )[\w.]+", "bold")
        coloured.highlight_regex(r"\b(graph|return|alias|repeat)\b", "magenta")
        out.print(coloured)
