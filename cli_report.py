"""``effcc report``: a plan as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_support import JsonOption, check_writable, open_plan, print_json, write_text


def report_command(
    plan: Annotated[Path, typer.Argument(help="A plan file made by 'effcc plan'.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: the plan's name with .html.")] = None,
    dumps: Annotated[
        Path | None, typer.Option(help="Folder of pass dumps. Default: 'passes' beside the plan, if it fits.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a plan as one HTML file that needs no network: memory over time, schedule, peak holders, fallbacks."""
    from .errors import OptionError
    from .inspection.stages import dumps_beside
    from .report.page import render_report

    loaded = open_plan(plan)
    target = output or plan.with_suffix(".html")
    if dumps is not None and not dumps.is_dir():
        raise OptionError(
            f"there is no folder {dumps}", remedy="--dumps takes the folder that --dump or EFFCC_DUMP named"
        )
    check_writable(target)
    write_text(target, render_report(loaded, dumps or dumps_beside(plan, loaded), folder=plan.parent))
    if json:
        print_json({"report": str(target)})
    else:
        print(target)
