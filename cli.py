"""The command line. Each command lives in ``cli_<name>.py``; torch is imported only by those that need it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from . import __version__
from .cli_calibrate import calibrate_command
from .cli_devices import devices_command
from .cli_docs import docs_command
from .cli_explain import explain_command
from .cli_export import export_command
from .cli_inspect import inspect_command
from .cli_map_memory import map_memory_command
from .cli_opt import opt_command
from .cli_passes import passes_command
from .cli_place_experts import place_experts_command
from .cli_plan import plan_command
from .cli_predict import predict_app
from .cli_report import report_command
from .cli_run import run_command
from .cli_simulate import simulate_app
from .cli_trace_experts import trace_experts_command
from .cli_verify import verify_command
from .errors import EffccError
from .logs import set_up as set_up_logs

#: Exit code after Ctrl-C: what a shell gives for SIGINT, and typer too.
INTERRUPTED = 130
#: Where to tell us about errors that are ours.
REPORT_TO = "the project's issue tracker"

app = typer.Typer(
    name="effcc",
    help="A graph compiler and scheduler for PyTorch: captures a model, plans its memory and time, and runs the plan.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"effcc {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    set_up_logs()


app.command("plan", rich_help_panel="Plan")(plan_command)
app.command("run", rich_help_panel="Plan")(run_command)
app.command("verify", rich_help_panel="Plan")(verify_command)
app.command("map-memory", rich_help_panel="Plan")(map_memory_command)
app.command("place-experts", rich_help_panel="Plan")(place_experts_command)
app.command("trace-experts", rich_help_panel="Plan")(trace_experts_command)
app.add_typer(predict_app, name="predict", rich_help_panel="Plan")
app.add_typer(simulate_app, name="simulate", rich_help_panel="Plan")
app.command("explain", rich_help_panel="Read")(explain_command)
app.command("inspect", rich_help_panel="Read")(inspect_command)
app.command("report", rich_help_panel="Read")(report_command)
app.command("export", rich_help_panel="Read")(export_command)
app.command("docs", rich_help_panel="Read")(docs_command)
app.command("opt", rich_help_panel="Compiler")(opt_command)
app.command("passes", rich_help_panel="Compiler")(passes_command)
app.command("devices", rich_help_panel="Devices")(devices_command)
app.command("calibrate", rich_help_panel="Devices")(calibrate_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the ``effcc`` script.

    Exit codes: 0 done, 1 a fault of ours, 2 bad input or found wanting, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or bool(os.environ.get("EFFCC_DEBUG"))
    code: int | str | None = 0
    try:
        app(args=[argument for argument in given if argument != "--debug"], prog_name="effcc")
    except SystemExit as error:  # typer ends every command so, also --help and wrong usage (which it has shown)
        code = error.code
        if code == INTERRUPTED:
            print("effcc: interrupted", file=sys.stderr)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text, code = describe(error)
        print(text, file=sys.stderr)
    _flush_standard_output()
    sys.exit(code)


def describe(error: BaseException) -> tuple[str, int]:
    """What is printed for an error, and the exit code."""
    ours = _effcc_error(error)
    if ours is not None:
        return f"effcc: error: {ours}\n  effcc docs {type(ours).__name__} says more", 2
    if isinstance(error, OSError) and error.strerror:
        place = f"\n  at {error.filename}" if error.filename else ""
        return f"effcc: error: {error.strerror}{place}", 2
    if isinstance(error, MemoryError):
        return "effcc: error: this machine's memory is used up\n  free some, or plan a smaller batch", 2
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"effcc: unexpected {type(error).__name__}: {error}\n"
        f"  at {frame.filename}:{frame.lineno}\n"
        f"  This is a fault of effcc {__version__}. Run again with --debug and send what it prints\n"
        f"  to {REPORT_TO}."
    ), 1


def _effcc_error(error: BaseException) -> EffccError | None:
    """The error itself, or the one that torch's compiler has wrapped."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, EffccError):
            return current
        current = getattr(current, "inner_exception", None) or current.__cause__
    return None


def _flush_standard_output() -> None:
    """Here, because where that fails (a full disk, a reader that has gone) the interpreter's last flush would fail
    with a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"effcc: error: cannot write the output: {error.strerror}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
