"""``effcc opt``: run passes on IR text, for tests, reproducers and curiosity."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_support import JsonOption, console, print_json, read_text, table, write_text
from .errors import OptionError
from .formatting import seconds_text


def opt_command(
    file: Annotated[Path | None, typer.Argument(help="A graph as IR text; '-' reads standard input.")] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("-p", "--passes", help="Passes to run: 'name{option=value},name2'. May be given several times."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write here, not to standard output.")] = None,
    dump_dir: Annotated[Path | None, typer.Option("--dump", help="Write every pass's IR to this folder.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not verify around each pass.")] = False,
    timing: Annotated[bool, typer.Option("--timing", help="Print the time of each pass to standard error.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Print what each pass changed instead of the result.")] = False,
    list_passes: Annotated[bool, typer.Option("--list", help="List the passes and their options.")] = False,
    json: JsonOption = False,
) -> None:
    """Run passes on IR text files.

    Without -p the graph is read, verified and printed again.
    """
    if list_passes:
        _list(json)
        return
    if file is None:
        raise OptionError("no input file", remedy="effcc opt FILE.ir -p normalize; --list shows the passes")
    from .ir.parser import parse_graph
    from .ir.printer import print_graph
    from .passes.manager import PassManager
    from .passes.pipeline import parse_pipeline

    text = sys.stdin.read() if str(file) == "-" else read_text(file, "IR file")
    graph = parse_graph(text, str(file))
    diffs: list[str] = []
    before = [print_graph(graph)]

    def watch(moment: str, pass_: object, current: object) -> None:
        if diff and moment == "after":
            after = print_graph(current)  # type: ignore[arg-type]
            diffs.append(text_diff(before[0], after, "before", getattr(pass_, "name", "after")))
            before[0] = after

    manager = PassManager(
        [pass_ for each in passes or [] for pass_ in parse_pipeline(each)],
        dump_dir=dump_dir,
        verify=not no_verify,
        callback=watch,
    )
    result = manager.run(graph)
    if timing:
        for record in manager.records:
            changed = f"{record.ops_before} -> {record.ops_after} ops" if record.changed else "unchanged"
            print(f"{seconds_text(record.seconds):>10}  {record.text}  {changed}", file=sys.stderr)
    shown = "".join(diffs) if diff else print_graph(result)
    if json:
        print_json({"graph": print_graph(result), "passes": manager.records, "diff": "".join(diffs) if diff else None})
    elif output:
        write_text(output, shown)
    else:
        sys.stdout.write(shown)


def text_diff(before: str, after: str, left: str, right: str, context: int = 2) -> str:
    """A unified diff of two IR texts; empty where they are equal."""
    import difflib

    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), left, right, lineterm="", n=context)
    return "".join(f"{line}\n" for line in lines)


def _list(json: bool) -> None:
    from .passes.pipeline import PIPELINES, all_passes, pass_options

    known, broken = all_passes()
    if json:
        print_json(
            {
                "passes": {name: {o: str(t) for o, (_, t) in pass_options(cls).items()} for name, cls in known.items()},
                "pipelines": dict(PIPELINES),
                "not_loaded": broken,
            }
        )
        return
    rows = table("pass", "options", "what it does")
    for name, cls in sorted(known.items()):
        options = [f"{option}: {getattr(kind, '__name__', kind)}" for option, (_, kind) in pass_options(cls).items()]
        rows.add_row(name, ", ".join(options), (cls.__doc__ or "").strip().partition("\n")[0])
    for name, text in PIPELINES.items():
        rows.add_row(name, "", f"stands for {text}")
    out = console()
    out.print(rows)
    for module, reason in broken.items():
        out.print(f"not loaded: {module} ({reason})")
