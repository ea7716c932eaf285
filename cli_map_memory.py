"""``effcc map-memory``: offsets for buffers with known lifetimes, from CSV to CSV."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_support import JsonOption, console, print_json, read_text, stage, table, write_text
from .errors import MappingError, OptionError
from .formatting import bytes_text, seconds_text

if TYPE_CHECKING:
    from .cost_model.offset_assignment.problem import Result


def map_memory_command(
    files: Annotated[list[Path], typer.Argument(help="CSV files: id,lower,upper,size[,alignment,hint,gaps].")],
    capacity: Annotated[
        int | None, typer.Option("--capacity", min=0, help="Bytes to stay within; ends at the first map that does.")
    ] = None,
    minimize: Annotated[
        bool, typer.Option("--minimize", help="Find the lowest map (the default without --capacity).")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the rows with their offsets here; with several files, a folder."),
    ] = None,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.0, help="Seconds for each file.")] = 10.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the searches' random choices.")] = 0,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="Of a plan: whose scratchpad. Default: the plan's device.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Place buffers with known lifetimes in one arena; or, for a PLAN.effcc, in the scratchpad.

    Reads and writes MiniMalloc's CSV: a buffer is live at times lower <= t < upper; a gap is written 3-7 (free) or
    3-7@0:128 (only these bytes in use). Every map is checked by a validator that shares no code with the solver.
    Exit code 0: solved, 1: not within the capacity or the time (the best map is written all the same), 2: bad input.

    Of a plan, each use of each buffer is served from the scratchpad or from device memory: copied, there already, or
    left out, as makes the steps fastest, beside XLA's heap and a greedy choice, with a bound.
    """
    if capacity is not None and minimize:
        raise OptionError("--capacity and --minimize exclude each other", remedy="give one of them")
    if any(file.suffix == ".effcc" for file in files):
        from .cli_map_tiers import map_plan

        map_plan(files, device, capacity, output, time_limit, seed, json)
        return
    if device is not None:
        raise OptionError("--device without a plan", remedy="a CSV's buffers have one arena, whatever the device")
    targets = _targets(files, output)
    rows = []
    for file, target in zip(files, targets, strict=True):
        begin = time.perf_counter()
        result = _map(file, target, capacity, time_limit, seed, quiet=json)
        rows.append((file, result, time.perf_counter() - begin))
    if json:
        facts = [_facts(result, seconds, seed) for _, result, seconds in rows]
        named = [{"file": str(file), **each} for (file, _, _), each in zip(rows, facts, strict=True)]
        print_json(facts[0] if len(files) == 1 else named)
    else:
        _print(rows)
    if any(result.status in ("infeasible", "timeout") for _, result, _ in rows):
        raise typer.Exit(1)


def _targets(files: list[Path], output: Path | None) -> list[Path | None]:
    """Where each file's map goes."""
    if output is None:
        return [None] * len(files)
    if len(files) == 1 and not output.is_dir():
        return [output]
    if not output.is_dir():
        raise OptionError(f"{output} is not a folder", remedy="with several files, -o names a folder that exists")
    if len({file.name for file in files}) < len(files):
        raise OptionError("two files have the same name", remedy="map them one after the other")
    return [output / file.name for file in files]


def _map(file: Path, target: Path | None, capacity: int | None, time_limit: float, seed: int, *, quiet: bool) -> Result:
    import csv
    import io

    from .cost_model.offset_assignment.csv_format import read
    from .cost_model.offset_assignment.solver import solve
    from .ir.mapping_validator import validate_mapping

    given = read(read_text(file, "memory map"), str(file))
    with stage(f"mapping {file.name}", quiet):
        result = solve(given.problem, capacity, time_limit=time_limit, seed=seed)
    text = given.solved(result.offsets)
    validate_mapping(list(csv.DictReader(io.StringIO(text))), result.height)
    if target is not None:
        if target.exists() and target.samefile(file):
            raise MappingError(
                "the output would replace the input", where=str(file), remedy="choose another name for -o"
            )
        write_text(target, text)
    return result


def _facts(result: Result, seconds: float, seed: int) -> dict[str, Any]:
    return {
        "height": result.height,
        "lower_bound": result.lower_bound,
        "gap": result.gap,
        "status": result.status,
        "seconds": seconds,
        "seed": seed,
    }


def _print(rows: list[tuple[Path, Result, float]]) -> None:
    out = console()
    numbers = ("buffers", "height", "lower bound", "gap", "time")
    shown = table("file", *numbers, "status", "made by", right=numbers)
    for file, result, seconds in rows:
        shown.add_row(
            file.name,
            str(result.offsets.size),
            f"{result.height} ({bytes_text(result.height)})",
            str(result.lower_bound),
            f"{result.gap:.3%}",
            seconds_text(seconds),
            result.status,
            result.solver,
        )
    out.print(shown)
