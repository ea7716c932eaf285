"""``effcc simulate pipeline``: iteration time, memory and bubble of pipelines in a CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_support import JsonOption, console, print_json, stage, table
from .formatting import bytes_text, seconds_text

if TYPE_CHECKING:
    from .passes.pipeline_parallel.predict import Prediction

simulate_app = typer.Typer(
    name="simulate",
    help="Simulate schedules without running anything.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@simulate_app.callback()
def _simulate() -> None:
    """Simulate schedules without running anything."""


@simulate_app.command("pipeline")
def simulate_pipeline_command(
    file: Annotated[Path, typer.Argument(help="CSV of pipelines: model shape, method, stage times.")],
    calibrate_row: Annotated[
        int | None,
        typer.Option(
            "--calibrate-row",
            metavar="N",
            help="Take rates from what was measured in row N (from 0) and predict all others from their shape alone.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", "-d", help="A name from 'effcc devices', or a device file.")
    ] = "a100-80g",
    json: JsonOption = False,
) -> None:
    """Predict iteration time, peak memory and bubble of pipeline schedules.

    Without --calibrate-row each row's own stage times are simulated. The measured columns (iteration_ms, peak_mb_*) are
    read in the calibration row alone. Milliseconds and MiB.
    """  # fmt: skip
    from .cost_model.devices import load_device
    from .passes.pipeline_parallel import calibration, rows

    target = load_device(device)
    asked = rows.read_rows(file)
    rates = None
    if calibrate_row is not None:
        measured = rows.read_measured(file, calibrate_row)
        rates = calibration.calibrate(asked[calibrate_row], measured, target)
    with stage(f"simulate {len(asked)} pipelines", quiet=json):
        found = calibration.predict_rows(asked, target, rates)
    if json:
        print_json([_facts(each) for each in found])
    else:
        _print(found)


def _facts(each: Prediction) -> dict[str, Any]:
    return {
        "row": each.row.number,
        "method": each.row.method,
        "vocabulary": each.row.vocabulary,
        "iteration_ms": each.seconds * 1e3,
        "peak_mb": each.peak / 2**20,
        "bubble": each.bubble,
    }


def _print(found: list[Prediction]) -> None:
    columns = ("row", "method", "vocabulary", "iteration", "peak memory", "bubble", "live microbatches")
    rows = table(*columns, right=("row", *columns[2:]))
    for each in found:
        rows.add_row(
            str(each.row.number), each.row.method, str(each.row.vocabulary), seconds_text(each.seconds),
            bytes_text(each.peak), f"{100 * each.bubble:.1f} %", str(max(each.run.live)),
        )  # fmt: skip
    console().print(rows)
