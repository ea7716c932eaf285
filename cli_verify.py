"""``effcc verify``: is a plan or a graph sound?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_support import JsonOption, open_plan, print_json, read_text
from .errors import EffccError


def verify_command(
    files: Annotated[list[Path], typer.Argument(help="Plan files (.effcc) and IR text files (.ir).")],
    json: JsonOption = False,
) -> None:
    """Check plans and IR text files.

    A plan: digests, schema, overlaps of live buffers, uses before definitions, peak against budget (by a validator that
    shares no code with the planner), and every graph in it. Exit code 0: all are sound, 2: one is not.
    """
    failures: dict[str, str | None] = {}
    for file in files:
        try:
            what = _verify_graph(file) if _is_text(file) else _verify_plan(file)
            failures[str(file)] = None
            if not json:
                print(f"{file}: sound ({what})")
        except EffccError as error:
            failures[str(file)] = str(error)
            if not json:
                print(f"{file}: {error}")
    if json:
        print_json([{"file": name, "sound": reason is None, "error": reason} for name, reason in failures.items()])
    if any(failures.values()):
        raise typer.Exit(2)


def _is_text(file: Path) -> bool:
    """IR text by its name, or by what it begins with."""
    if file.suffix in (".ir", ".effcc"):
        return file.suffix == ".ir"
    try:
        with file.open("rb") as opened:
            return opened.read(64).lstrip().startswith(b"graph")
    except OSError:
        return False  # load_plan says why it cannot be read


def _verify_graph(file: Path) -> str:
    from .ir.parser import parse_graph
    from .ir.verifier import verify

    graph = parse_graph(read_text(file, "IR file"), str(file))
    verify(graph)
    return f"graph {graph.name}, {len(graph.nodes)} ops"


def _verify_plan(file: Path) -> str:
    from .ir.parser import parse_graph
    from .ir.verifier import verify

    loaded = open_plan(file)
    for name, text in loaded.graphs_text.items():
        verify(parse_graph(text, f"{file}:{name}"))
    plan = loaded.plan
    return f"plan for {plan.device}, {len(plan.steps)} steps, {len(plan.buffers)} buffers, {len(plan.graphs)} graphs"
