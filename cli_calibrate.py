"""``effcc calibrate``: measure this machine, so that predictions for ``cpu`` are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_support import JsonOption, check_writable, console, heading, print_json, stage, table, write_text
from .cost_model.measuring_time import SECONDS
from .errors import OptionError
from .formatting import bytes_text, count_text, seconds_text


def calibrate_command(
    seconds: Annotated[float, typer.Option("--seconds", min=1.0, max=600.0, help="How long to measure.")] = SECONDS,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also write the device file here.")] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Do not keep the result for later plans.")] = False,
    from_data: Annotated[
        bool, typer.Option("--from-data", help="Train the kernel-time model from EFFCC_BENCH_DATA instead.")
    ] = False,
    steps: Annotated[
        bool, typer.Option("--steps", help="With --from-data: calibrate whole training steps, not kernels.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure this machine's CPU: matrix products by library and layout, memory, call overhead, disk.

    The result replaces the generic device 'cpu' in plans made here, and decides which library runs a product.
    With --from-data, trains the model behind 'effcc predict kernels' on $EFFCC_BENCH_DATA/kernels/*.train.csv.gz; with
    --from-data --steps, the constants behind 'effcc predict FILE.py --mesh' on $EFFCC_BENCH_DATA/clusters/*_given.csv.
    """
    if from_data:
        (_fit_steps if steps else _train)(output, save=not no_save, json=json)
        return
    if steps:
        raise OptionError(
            "--steps without --from-data", remedy="add --from-data: steps are calibrated on measured rows"
        )
    import msgspec

    if output is not None:
        check_writable(output)
    from .calibrating import calibrate_machine
    from .cost_model.calibrate import calibrated_device
    from .cost_model.measuring_time import Account

    account = Account()
    with stage(f"measure for about {seconds:.0f} s", quiet=json):
        device = calibrate_machine(seconds, save=not no_save, account=account)
    if output is not None:
        write_text(output, msgspec.json.format(msgspec.json.encode(device), indent=1).decode() + "\n")
    if json:
        print_json(device)
        return
    out = console()
    heading(out, device.name, f": {device.title}")
    for dtype, figure in device.matrix.items():
        out.print(f"  matrix products in {dtype}: {count_text(figure.value, 'FLOP/s')}")
    out.print(f"  memory: {bytes_text(device.memory)} at {count_text(device.bandwidth, 'B')}/s")
    out.print(f"  call overhead: {seconds_text(device.launch.value)}")
    rows = table("dtype", "layout", "m", "k", "n", "library", "rate", right=("m", "k", "n", "rate"))
    for each in device.gemm:
        shape = (str(each.m), str(each.k), str(each.n))
        rows.add_row(each.dtype, each.layout, *shape, each.library, count_text(each.rate, "FLOP/s"))
    out.print(rows)
    if not device.added:
        out.print("generated kernels were not measured and keep general figures; EFFCC_LOGS=calibrate says why")
    out.print(f"measured for {account.measured:.1f} s, after compiling for {account.compiled:.1f} s")
    if not no_save:
        kept = calibrated_device() == device
        out.print("kept: plans for cpu made here use it" if kept else "not kept: the cache folder cannot be written")


def _train(output: Path | None, *, save: bool, json: bool) -> None:
    """Train the kernel-time model, write it, and say what it was trained on."""
    from .cost_model.kernel_time import model_file, training

    data, target = _data_folder(output, model_file.own_path(), save)
    out = console()
    with stage("train the kernel-time model", quiet=json):
        model = training.train_from(data, log=(lambda text: None) if json else typer.echo)
    encoded = model_file.encode(model)
    model_file.write(target, encoded)
    if output is not None and save:
        model_file.write(model_file.own_path(), encoded)
    if json:
        print_json({"file": str(target), "bytes": len(encoded), **model.provenance})
        return
    out.print(f"{target}: {bytes_text(len(encoded))}, from {model.provenance['rows']} rows")


def _fit_steps(output: Path | None, *, save: bool, json: bool) -> None:
    """Fit the constants of training steps, write them, and say on what and how well."""
    from math import exp

    from .cost_model.parallel_training import constants, fitting

    data, target = _data_folder(output, constants.own_path(), save)
    with stage("calibrate training steps", quiet=json):
        made = fitting.calibrate_from(data, log=(lambda text: None) if json else typer.echo)
    encoded = constants.encode(made)
    for path in dict.fromkeys([target, *([constants.own_path()] if save else [])]):
        check_writable(path)
        write_text(path, encoded.decode())
    if json:
        print_json({"file": str(target), **made.provenance})
        return
    console().print(
        f"{target}: 90 % of steps within a factor of {exp(made.seen):.2f}, {exp(made.unseen):.2f} on other devices"
    )


def _data_folder(output: Path | None, own: Path, save: bool) -> tuple[Path, Path]:
    """The folder of measured rows, and where the result goes."""
    import os

    from .errors import KernelDataError

    data = os.environ.get("EFFCC_BENCH_DATA")
    if not data:
        raise OptionError(
            "--from-data needs the folder of measured rows",
            remedy="set EFFCC_BENCH_DATA to the folder above kernels/ and clusters/",
        )
    if not save and output is None:
        raise OptionError("--from-data --no-save without -o keeps nothing", remedy="name a file with -o")
    target = output or own
    check_writable(target)
    if not Path(data).is_dir():
        raise KernelDataError(f"the folder {data} does not exist", remedy="correct EFFCC_BENCH_DATA")
    return Path(data), target
