"""``effcc calibrate``: measure this machine, so that predictions for ``cpu`` are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_support import JsonOption, check_writable, console, heading, print_json, stage, table, write_text
from .formatting import bytes_text, count_text, seconds_text


def calibrate_command(
    seconds: Annotated[float, typer.Option("--seconds", min=1.0, max=600.0, help="How long to measure.")] = 20.0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also write the device file here.")] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Do not keep the result for later plans.")] = False,
    from_data: Annotated[
        bool, typer.Option("--from-data", help="Train the kernel-time model from EFFCC_BENCH_DATA instead.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure this machine's CPU: matrix products by library and layout, memory, call overhead, disk.

    The result replaces the generic device 'cpu' in plans made here, and decides which library runs a product.
    With --from-data, trains the model behind 'effcc predict kernels' on $EFFCC_BENCH_DATA/kernels/*.train.csv.gz.
    """
    if from_data:
        _train(output, save=not no_save, json=json)
        return
    import msgspec

    if output is not None:
        check_writable(output)
    from .cost_model.calibrate import calibrate, calibrated_device

    with stage(f"measure for about {seconds:.0f} s", quiet=json):
        device = calibrate(seconds, save=not no_save)
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
    if not no_save:
        kept = calibrated_device() == device
        out.print("kept: plans for cpu made here use it" if kept else "not kept: the cache folder cannot be written")


def _train(output: Path | None, *, save: bool, json: bool) -> None:
    """Train the kernel-time model, write it, and say what it was trained on."""
    import os

    from .errors import KernelDataError, OptionError

    data = os.environ.get("EFFCC_BENCH_DATA")
    if not data:
        raise OptionError(
            "--from-data needs the folder of measured kernels",
            remedy="set EFFCC_BENCH_DATA to the folder above kernels/",
        )
    if not save and output is None:
        raise OptionError("--from-data --no-save without -o keeps nothing", remedy="name a file with -o")
    from .cost_model.kernel_time import model_file, training

    target = output or model_file.own_path()
    check_writable(target)
    if not Path(data).is_dir():
        raise KernelDataError(f"the folder {data} does not exist", remedy="correct EFFCC_BENCH_DATA")
    out = console()
    with stage("train the kernel-time model", quiet=json):
        model = training.train_from(Path(data), log=(lambda text: None) if json else typer.echo)
    encoded = model_file.encode(model)
    model_file.write(target, encoded)
    if output is not None and save:
        model_file.write(model_file.own_path(), encoded)
    if json:
        print_json({"file": str(target), "bytes": len(encoded), **model.provenance})
        return
    out.print(f"{target}: {bytes_text(len(encoded))}, from {model.provenance['rows']} rows")
