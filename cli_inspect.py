"""``effcc inspect``: what each pass did, and the whole history of one value."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_support import JsonOption, console, heading, paged, print_json, table
from .errors import OptionError
from .formatting import bytes_text, seconds_text

if TYPE_CHECKING:
    from rich.text import Text

    from .inspection.side_by_side import Row
    from .inspection.stages import Dump, Stage


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A plan file (plan.effcc) or a folder of dumps (EFFCC_DUMP).")],
    show: Annotated[str | None, typer.Option("--show", help="Print one stage: its number or its pass's name.")] = None,
    diff: Annotated[
        tuple[str, str] | None, typer.Option("--diff", metavar="A B", help="Print what differs between two stages.")
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", "-y", help="With --diff: the two stages in two columns.")
    ] = False,
    node: Annotated[
        str | None, typer.Option("--node", help="The history of one value, such as %17 or forward_0:%17.")
    ] = None,
    find: Annotated[
        str | None,
        typer.Option(
            "--find", metavar="QUERY", help="Values by source line (model.py:88), size (>100MiB), type or module path."
        ),
    ] = None,
    graph: Annotated[str | None, typer.Option("--graph", help="Look at this graph only.")] = None,
    dumps: Annotated[
        Path | None, typer.Option("--dumps", help="Folder of a plan's dumps. Default: 'passes' beside it, if it fits.")
    ] = None,
    tui: Annotated[bool, typer.Option("--tui", help="Browse source, IR and plan in the terminal.")] = False,
    json: JsonOption = False,
) -> None:
    """List the passes of a plan or a dump folder, show one, compare two, find values, follow one through everything.

    On a terminal, what is longer than the screen goes through the pager ($PAGER, else less).
    """
    from .inspection.stages import find_stage, only, open_dump

    if dumps is not None and not dumps.is_dir():
        raise OptionError(f"there is no folder {dumps}", remedy="--dumps takes the folder that --dump named")
    dump = open_dump(path, dumps)
    if graph is not None:
        dump = only(dump, graph)
    if tui:
        from .inspection.browser import browse

        browse(dump)
    elif node is not None:
        _node(dump, node, json)
    elif find is not None:
        _find(dump, find, find_stage(dump, show) if show is not None else None, json)
    elif diff is not None:
        _diff(dump, *diff, side_by_side, json)
    elif show is not None:
        stage = find_stage(dump, show)
        if json:
            print_json({"stage": stage.label, "graph": stage.graph, "text": stage.text()})
        else:
            _print_text(stage)
    else:
        _list(dump, json)


def _list(dump: Dump, json: bool) -> None:
    from .inspection.changes import Change, changes

    made = changes(dump)
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
                "change": made.get(stage.index),
            }
            for stage in dump.stages
        ]
        print_json({"path": str(dump.path), "stages": rows})
        return
    right = ("#", "ops", "time", "size")
    rows_table = table("#", "pass", "graph", "phase", "ops", "time", "size", "what it changed", right=right)
    nothing = Change({}, {}, 0, 0)
    for stage in dump.stages:
        what = f"failed: {stage.failed.splitlines()[0]}" if stage.failed else made.get(stage.index, nothing).words
        if not what and not stage.changed:
            what = "unchanged"
        rows_table.add_row(
            str(stage.index), stage.label, stage.graph, stage.phase, str(stage.ops),
            seconds_text(stage.seconds) if stage.seconds else "", _size(stage), what,
            style="red" if stage.failed else None,
        )  # fmt: skip
    with paged() as out:
        out.print(rows_table)
        out.print(
            "--show N prints one, --diff A B compares two, --node %name follows one value, --find looks for values"
        )


def _size(stage: Stage) -> str:
    """Of the text."""
    try:
        return bytes_text(len(stage.text().encode("utf-8", "surrogateescape")))
    except OptionError:  # its file is gone
        return ""


def _diff(dump: Dump, left: str, right: str, columns: bool, json: bool) -> None:
    from .cli_opt import text_diff
    from .inspection.side_by_side import side_by_side
    from .inspection.stages import find_stage

    one, other = find_stage(dump, left), find_stage(dump, right)
    names = f"{one.index} {one.name}", f"{other.index} {other.name}"
    text = text_diff(one.text(), other.text(), *names)
    if json:
        rows = side_by_side(one.text(), other.text()) if columns else []
        print_json({"left": names[0], "right": names[1], "diff": text} | ({"rows": rows} if columns else {}))
        return
    with paged() as out:
        if not text:
            out.print("the two are equal")
        elif columns:
            _print_columns(out, side_by_side(_shown(one), _shown(other)), names)
        else:
            for line in text.splitlines():
                style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
                out.print(line, style=style, markup=False)


def _shown(stage: Stage) -> str:
    from .inspection.links import without_places

    return stage.text() if stage.is_code else without_places(stage.text())


def _print_columns(out: object, rows: list[Row], names: tuple[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from .inspection.colours import coloured, short_paths
    from .inspection.side_by_side import MARKS

    assert isinstance(out, Console)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False, expand=out.is_terminal)
    for name in names:
        shown.add_column("", justify="right", style="dim", no_wrap=True)
        shown.add_column(name, overflow="fold", ratio=1)
    styles = {"changed": ("on grey19", "on grey19"), "added": ("", "on dark_green"), "removed": ("on dark_red", "")}

    def cell(mark: str, line: str, style: str) -> Text:
        text = coloured(f"{mark} {short_paths(line)}", style=style)
        text.no_wrap = False
        return text

    for row in rows:
        if row.kind == "folded":
            shown.add_row("", f"    ... {row.left_line} equal lines", "", "", style="dim")
            continue
        marks, style = MARKS[row.kind], styles.get(row.kind, ("", ""))
        shown.add_row(
            str(row.left_line or ""), cell(marks[0], row.left, style[0]),
            str(row.right_line or ""), cell(marks[1], row.right, style[1]),
        )  # fmt: skip
    out.print(shown)


def _node(dump: Dump, name: str, json: bool) -> None:
    from .inspection.colours import coloured, short_paths
    from .inspection.history import node_history
    from .inspection.model_source import short_path

    history = node_history(dump, name)
    shown = name.removeprefix("%")
    if not history.events:
        raise OptionError(
            f"there is no value %{shown} in {dump.path}", remedy="names are as in the IR: --show 0, or look with --find"
        )
    if json:
        print_json(history)
        return
    with paged() as out:
        if history.source:
            heading(out, f"%{history.name}", f" comes from {short_path(history.source)}")
        else:
            heading(out, f"%{history.name}", ": no source line is known")
        for event in history.events:
            heading(out, f"\n{event.stage}", f"  {event.what}")
            for line in event.lines:
                out.print("    ", coloured(short_paths(line)), sep="")


def _find(dump: Dump, query: str, stage: Stage | None, json: bool) -> None:
    from .inspection.model_source import short_path
    from .inspection.search import find

    found = find(dump, query, stage)
    if json:
        print_json(found)
        return
    if not found:
        raise OptionError(
            f"nothing in {dump.path} fits {query!r}",
            remedy='a source line is model.py:88, a size >100MiB, a type f32[2,256], a module path "layers.*.mlp"',
        )
    rows = table("value", "bytes", "type", "op", "where", "module", right=("bytes",))
    for each in found:
        size = bytes_text(each.bytes) if each.bytes else ""
        where = short_path(each.source.partition(' "')[0])
        rows.add_row(each.reference, size, each.type, each.op, where, each.module)
    with paged() as out:
        out.print(rows)
        out.print(f"{len(found)} values; --node VALUE follows one")


def _print_text(stage: Stage) -> None:
    from .inspection.colours import coloured

    text = stage.text()
    if not console().is_terminal:
        print(text, end="" if text.endswith("\n") else "\n")
        return
    with paged() as out:
        for line in text.splitlines():
            out.print(coloured(line, stage.is_code))
