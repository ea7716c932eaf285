"""``effcc predict``; and ``effcc predict kernels``: times of kernels from their sizes, from CSV to CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_predict_model import ModelOrCommand, predict_model_command
from .cli_support import JsonOption, check_writable, console, print_json, read_text, stage, table, write_text
from .errors import KernelDataError
from .formatting import seconds_text

if TYPE_CHECKING:
    from .cost_model.kernel_time.gpus import Gpu
    from .cost_model.kernel_time.model import Banded, KernelModel
    from .cost_model.kernel_time.rows import Rows, Table

predict_app = typer.Typer(
    name="predict",
    cls=ModelOrCommand,
    help="Predict times without running anything: of a model file's step (FILE.py), or of kernels.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: The columns that are written, in this order.
COLUMNS = ("predicted_ms", "p05_ms", "p95_ms")


@predict_app.callback()
def _predict() -> None:
    """Predict times without running anything: of a model file's step (effcc predict FILE.py), or of kernels."""


predict_app.command("model")(predict_model_command)


@predict_app.command("kernels")
def predict_kernels_command(
    file: Annotated[Path, typer.Argument(help="CSV of kernels: OPName,Device and B,M,N,K or B,H.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the rows with their predictions here.")
    ] = None,
    device_file: Annotated[
        Path | None, typer.Option("--device-file", help="JSON with figures of devices that are not packaged.")
    ] = None,
    adapt: Annotated[
        Path | None, typer.Option("--adapt", help="CSV of measured kernels (with Latency, in ms) of the same devices.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A model of your own instead of the packaged one.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Predict the times of GPU kernels (f32, eager PyTorch).

    Writes the rows with predicted_ms and the 90 % band, p05_ms to p95_ms, to -o or to standard output. Reads OPName,
    Device and the sizes; nothing that profiling gives. A few measured rows of a device (--adapt) correct all its rows.
    """
    if output is not None:
        check_writable(output)
    from .cost_model.kernel_time import gpus, model_file, rows

    asked = rows.read(file)
    given = gpus.read_device_file(device_file, read_text(device_file, "device file")) if device_file else {}
    devices = {group.device: gpus.find(group.device, given) for group in asked.groups}
    measured = _measured(rows.read(adapt, measured=True), devices, str(adapt)) if adapt is not None else {}
    trained = model_file.load(model)
    with stage(f"predict {len(asked.lines)} kernels", quiet=json or output is None):
        made = [(group, _predict_group(group, devices[group.device], measured, trained)) for group in asked.groups]
    text = asked.with_columns(_columns(asked, made))
    if output is not None:
        if output.exists() and output.samefile(file):
            raise KernelDataError(
                "the output would replace the input", where=str(file), remedy="choose another name for -o"
            )
        write_text(output, text)
    if json:
        print_json([_facts(group, banded, devices, measured, trained) for group, banded in made])
    elif output is None:
        typer.echo(text, nl=False)
    else:
        _print(made, devices, measured, trained)


def _measured(table_: Table, devices: dict[str, Gpu], where: str) -> dict[str, list[Rows]]:
    """Measured rows by the device they are of. Raises KernelDataError when they are of none that is asked for."""
    from .cost_model.kernel_time.gpus import key

    names = {key(name): name for name in devices}
    found: dict[str, list[Rows]] = {}
    for group in table_.groups:
        if key(group.device) in names:
            found.setdefault(names[key(group.device)], []).append(group)
    if not found:
        theirs = ", ".join(sorted({group.device for group in table_.groups}))
        raise KernelDataError(
            f"the measured rows are of {theirs}; none of them is asked for",
            where=where,
            remedy=f"measure some kernels on {', '.join(sorted(devices))}",
        )
    return found


def _predict_group(group: Rows, gpu: Gpu, measured: dict[str, list[Rows]], trained: KernelModel) -> Banded:
    from .cost_model.kernel_time.model import adapt, predict

    few = measured.get(group.device)
    return adapt(group, gpu, few, trained) if few else predict(group, gpu, trained)


def _columns(asked: Table, made: list[tuple[Rows, Banded]]) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {name: [""] * len(asked.lines) for name in COLUMNS}
    for group, banded in made:
        for name, values in zip(COLUMNS, (banded.seconds, banded.low, banded.high), strict=True):
            for place, value in zip(group.index.tolist(), (values * 1e3).tolist(), strict=True):
                columns[name][place] = f"{value:.6g}"
    return columns


def _facts(
    group: Rows, banded: Banded, devices: dict[str, Gpu], measured: dict[str, list[Rows]], trained: KernelModel
) -> dict[str, Any]:
    from .cost_model.kernel_time.model import family_model, nearest_measured

    near, known = nearest_measured(devices[group.device], family_model(trained, group.family))
    return {
        "family": group.family,
        "device": group.device,
        "rows": len(group),
        "seconds": float(banded.seconds.sum()),
        "device_was_measured": known,
        "nearest_measured_device": near,
        "adapted_to_rows": sum(len(rows) for rows in measured.get(group.device, [])),
        "index": group.index.tolist(),
        "predicted_ms": (banded.seconds * 1e3).tolist(),
        "p05_ms": (banded.low * 1e3).tolist(),
        "p95_ms": (banded.high * 1e3).tolist(),
    }


def _print(
    made: list[tuple[Rows, Banded]],
    devices: dict[str, Gpu],
    measured: dict[str, list[Rows]],
    trained: KernelModel,
) -> None:
    shown = table("kernels", "device", "rows", "sum", "band", "learned on", right=("rows", "sum", "band"))
    for group, banded in made:
        facts = _facts(group, banded, devices, measured, trained)
        source = (
            "this device" if facts["device_was_measured"] else f"others, nearest {facts['nearest_measured_device']}"
        )
        if facts["adapted_to_rows"]:
            source += f"; adapted to {facts['adapted_to_rows']} rows"
        width = float(((banded.high - banded.low) / (2 * banded.seconds)).mean())
        shown.add_row(
            group.family, group.device, str(len(group)), seconds_text(facts["seconds"]), f"±{width:.0%}", source
        )
    console().print(shown)
