"""``effcc export``: a plan or a graph in the formats of other tools."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_support import JsonOption, check_writable, open_plan, print_json, read_text, write_text
from .errors import OptionError

if TYPE_CHECKING:
    from .ir.graph import Graph

#: Format -> (what it needs, the ending of its file).
FORMATS = {
    "chrome-trace": ("plan", ".trace.json"),
    "memory-snapshot": ("plan", ".pickle"),
    "torch-csv": ("plan", ".csv"),
    "dot": ("graph", ".dot"),
    "model-explorer": ("graph", ".explorer.json"),
}


def export_command(
    path: Annotated[Path, typer.Argument(help="A plan file, a folder of dumps, or an IR text file.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"{', '.join(FORMATS)}.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: beside the input.")] = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", help="Of a plan or a folder: the stage whose graph is meant. Default: last."),
    ] = None,
    tier: Annotated[str, typer.Option(help="Of a memory snapshot: device, host, disk or scratchpad.")] = "device",
    json: JsonOption = False,
) -> None:
    """Write a plan's timeline for Perfetto, its memory for pytorch.org/memory_viz, a pipeline's actions for
    torch.distributed.pipelining, or a graph for Graphviz or Model Explorer.

    `effcc run --trace FILE` writes the timeline with a measured step beside it.
    """
    if to not in FORMATS:
        import difflib

        close = difflib.get_close_matches(to, FORMATS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise OptionError(f"--to {to!r} is not a format", remedy=f"{hint}the formats are {', '.join(FORMATS)}")
    needs, ending = FORMATS[to]
    target = output or (path / f"graph{ending}" if path.is_dir() else path.with_suffix(ending))
    make = _of_plan(path, to, tier) if needs == "plan" else _of_graph(path, to, stage)
    check_writable(target)
    content = make()
    if isinstance(content, bytes):
        from .ir.plan_file import write_atomically

        write_atomically(target, content)
    else:
        write_text(target, content)
    if json:
        print_json({"format": to, "path": str(target)})
    else:
        print(target)


def _of_plan(path: Path, to: str, tier: str) -> Callable[[], str | bytes]:
    from .ir.plan import TIERS

    if path.is_dir() or path.suffix == ".ir":
        raise OptionError(f"--to {to} needs a plan, and {path} is none", remedy="give the path of a plan.effcc")
    if tier not in TIERS:
        raise OptionError(f"--tier {tier!r} is not a memory tier", remedy=f"the tiers are {', '.join(TIERS)}")
    plan = open_plan(path).plan
    if to == "chrome-trace":
        from .export.chrome_trace import chrome_trace

        return lambda: json_module.dumps(chrome_trace(plan)) + "\n"
    if to == "torch-csv":
        from .passes.pipeline_parallel.plan import from_plan
        from .passes.pipeline_parallel.torch_csv import to_csv, without_embedding

        schedule = from_plan(plan)
        return lambda: to_csv(without_embedding(schedule))
    from .export.memory_snapshot import snapshot_bytes

    return lambda: snapshot_bytes(plan, tier)


def _of_graph(path: Path, to: str, stage: str | None) -> Callable[[], str | bytes]:
    from .export.graphs import dot, model_explorer_text

    graph = _graph(path, stage)
    return lambda: dot(graph) if to == "dot" else model_explorer_text(graph)


def _graph(path: Path, stage: str | None) -> Graph:
    if path.suffix == ".ir":
        from .ir.parser import parse_graph

        return parse_graph(read_text(path, "IR file"), str(path))
    from .inspection.stages import find_stage, open_dump

    dump = open_dump(path)
    last: Any = list(dump.last().values())
    chosen = find_stage(dump, stage) if stage is not None else last[0] if last else None
    graph = chosen.parsed if chosen is not None else None
    if graph is None:
        raise OptionError(f"{path} has no such graph", remedy="effcc inspect lists the stages; --stage names one")
    return graph
