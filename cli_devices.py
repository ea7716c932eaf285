"""``effcc devices``: the devices that plans can be made for."""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_support import JsonOption, console, heading, print_json, table
from .formatting import bytes_text, count_text, seconds_text


def devices_command(
    name: Annotated[str | None, typer.Argument(help="Show every figure of this device, with its source.")] = None,
    json: JsonOption = False,
) -> None:
    """List the devices that a plan can be made for, or show one in full.

    A device is a JSON file of peak rates, bandwidths and sizes. Wherever a name is asked for, the path of such a file
    may be given too.
    """
    from .cost_model.devices import figures, list_devices, load_device

    if name is not None:
        device = load_device(name)
        if json:
            print_json(device)
            return
        out = console()
        heading(out, device.name, f"  {device.title}")
        rows = table("figure", "value", "source", right=("value",))
        for label, figure in figures(device):
            rows.add_row(label, _figure_text(label, figure.value), figure.source)
        out.print(rows)
        return
    devices = [load_device(each) for each in list_devices()]
    if json:
        print_json({device.name: device for device in devices})
        return
    rows = table("device", "memory", "bandwidth", "f32", "bf16", "", right=("memory", "bandwidth", "f32", "bf16"))
    for device in devices:
        rates = [count_text(device.matrix_rate(dtype), "FLOP/s") for dtype in ("f32", "bf16")]
        bandwidth = f"{count_text(device.bandwidth, 'B')}/s"
        rows.add_row(device.name, bytes_text(device.memory), bandwidth, *rates, device.title)
    console().print(rows)


def _figure_text(label: str, value: float) -> str:
    if label.startswith(("matrix", "vector")):
        return count_text(value, "FLOP/s")
    if label.endswith(("bandwidth",)):
        return f"{count_text(value, 'B')}/s"
    if label.endswith(("latency", "launch")):
        return seconds_text(value)
    if label.endswith(("capacity", "bytes", "scratch")):
        return bytes_text(value)
    return f"{value:g}"
