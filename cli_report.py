"""``effcc report``: a plan as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_support import open_plan, write_text


def report_command(
    plan: Annotated[Path, typer.Argument(help="A plan file made by 'effcc plan'.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: the plan's name with .html.")] = None,
    dumps: Annotated[Path | None, typer.Option(help="Folder of pass dumps to list in the page.")] = None,
) -> None:
    """Write a plan as one HTML file that needs no network: memory over time, schedule, peak holders, fallbacks."""
    from .report.page import render_report

    loaded = open_plan(plan)
    target = output or plan.with_suffix(".html")
    write_text(target, render_report(loaded, dumps))
    print(target)
