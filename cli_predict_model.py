"""``effcc predict FILE.py``: whole steps on one device after the other, or on a mesh."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .cli_support import JsonOption, console, heading, print_json, quiet_torch, stage, table
from .errors import OptionError
from .formatting import bytes_text, count_text, seconds_text

if TYPE_CHECKING:
    from .cost_model.parallel_training.shape import TransformerShape
    from .predicting import Prediction


class ModelOrCommand(TyperGroup):
    """``effcc predict FILE.py`` is ``effcc predict model FILE.py``: what is no command's name is a model."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["model", *args]
        return super().parse_args(ctx, args)


def predict_model_command(
    model: Annotated[str, typer.Argument(metavar="FILE.py[:name]", help="As for 'effcc plan'.")],
    device: Annotated[
        str, typer.Option("--device", "-d", help="One or more, with commas: names from 'effcc devices', or files.")
    ] = "cpu",
    train: Annotated[bool, typer.Option("--train", help="A training step, not a forward pass.")] = False,
    optimizer: Annotated[str | None, typer.Option(help="Count this optimizer, not the file's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Convert parameters and inputs: f32, bf16, f16, f64.")] = None,
    mesh: Annotated[
        str | None, typer.Option("--mesh", metavar="dp=8,tp=8,pp=4", help="A mesh; axes dp, fsdp, tp, pp, cp, ep.")
    ] = None,
    microbatches: Annotated[
        int | None, typer.Option("--microbatches", min=1, help="With --mesh: of each data rank. Default: 4 x pp.")
    ] = None,
    recompute: Annotated[
        str, typer.Option("--recompute", help="With --mesh: none, full, or auto (full where it does not fit else).")
    ] = "auto",
    interleave: Annotated[int, typer.Option("--interleave", min=1, help="With --mesh: stages of a pipeline rank.")] = 1,
    zero: Annotated[
        int, typer.Option("--zero", min=0, max=2, help="With --mesh: shard optimizer (1), gradients (2).")
    ] = 0,
    json: JsonOption = False,
) -> None:
    """Predict the time and memory of a step, without running it.

    The model is captured once, without weights, and priced for each device: step time with a 90 % band, peak memory,
    model FLOP utilisation, and what bounds the step. With --mesh, a training step on that many devices; the file's
    inputs are then one microbatch of one data rank.
    """
    names = list(dict.fromkeys(part.strip() for part in device.split(",") if part.strip()))
    if not names:
        raise OptionError("--device names no device", remedy="see 'effcc devices'")
    from .plan_request import PlanRequest, check_options

    request = PlanRequest(model=model, train=train, optimizer=optimizer, dtype=dtype)
    check_options(request)
    if mesh is not None and not train:
        raise OptionError("--mesh without --train", remedy="add --train: meshes are priced for training steps")
    if mesh is None and (microbatches is not None or interleave > 1 or zero or recompute != "auto"):
        raise OptionError("--microbatches, --recompute, --interleave and --zero go with --mesh", remedy="give a mesh")
    shape = None
    with quiet_torch(), contextlib.redirect_stdout(sys.stderr):
        if mesh is None:
            from .predicting import predict_devices

            found = predict_devices(request, names, lambda text: stage(text, quiet=json))
        else:
            shape, found = _on_mesh(request.model, mesh, names, microbatches, dtype, recompute, interleave, zero, json)
    if json:
        print_json({"model": model, "mesh": mesh, "shape": shape, "devices": found, "energy": None})
        return
    _print(model, mesh, shape, found)


def _on_mesh(
    model: str, mesh: str, names: list[str], microbatches: int | None, dtype: str | None, recompute: str,
    interleave: int, zero: int, json: bool,
) -> tuple[TransformerShape, list[Prediction]]:  # fmt: skip
    from .cost_model.parallel_training.mesh import parse_mesh
    from .cost_model.parallel_training.setup import RECOMPUTE
    from .predicting import MeshRequest, predict_mesh

    if recompute not in ("auto", *RECOMPUTE):
        raise OptionError(f"--recompute {recompute!r} is not understood", remedy=f"auto, {', '.join(RECOMPUTE)}")
    asked = MeshRequest(model, parse_mesh(mesh), microbatches, dtype, recompute, interleave, zero)
    return predict_mesh(asked, names, lambda text: stage(text, quiet=json))


def _print(model: str, mesh: str | None, shape: TransformerShape | None, found: list[Prediction]) -> None:
    out = console()
    size = f" on {found[0].devices} devices ({mesh})" if mesh else ""
    parameters = f", {count_text(shape.parameters)} parameters" if shape else ""
    heading(out, model, f"{size}{parameters}")
    numbers = ("step", "90 % band", "peak", "of", "MFU", "tokens/s")
    rows = table("device", *numbers, "fits", "bound", right=numbers)
    for each in found:
        rows.add_row(
            each.device, seconds_text(each.seconds), f"{seconds_text(each.low)} to {seconds_text(each.high)}",
            bytes_text(each.peak), bytes_text(each.capacity), f"{100 * each.mfu:.1f} %",
            f"{each.tokens_per_second:.0f}" if each.tokens_per_second else "", "yes" if each.fits else "no",
            ", ".join(f"{name} {100 * share:.0f} %" for name, share in each.shares.items() if share >= 0.005),
        )  # fmt: skip
    out.print(rows)
    out.print("Energy and power: not available; no measured rows of them are at hand.")
    for each in found if mesh else ():
        spent = ", ".join(
            f"{name} {seconds_text(part)}" for name, part in each.parts.items() if part > 1e-3 * each.seconds
        )
        out.print(f"  {each.device}: recompute {each.recompute}; {spent}", markup=False)
        held = ", ".join(f"{name} {bytes_text(size)}" for name, size in each.memory.items() if size)
        out.print(f"  {each.device}: {held}", markup=False)
