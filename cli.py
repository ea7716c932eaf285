"""The command line. Each command lives in ``cli_<name>.py``; torch is imported only by those that need it."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from . import __version__
from .cli_calibrate import calibrate_command
from .cli_devices import devices_command
from .cli_explain import explain_command
from .cli_inspect import inspect_command
from .cli_opt import opt_command
from .cli_plan import plan_command
from .cli_report import report_command
from .cli_run import run_command
from .cli_verify import verify_command
from .errors import EffccError

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
    pass


app.command("plan", rich_help_panel="Plan")(plan_command)
app.command("run", rich_help_panel="Plan")(run_command)
app.command("verify", rich_help_panel="Plan")(verify_command)
app.command("explain", rich_help_panel="Read")(explain_command)
app.command("inspect", rich_help_panel="Read")(inspect_command)
app.command("report", rich_help_panel="Read")(report_command)
app.command("opt", rich_help_panel="Compiler")(opt_command)
app.command("devices", rich_help_panel="Devices")(devices_command)
app.command("calibrate", rich_help_panel="Devices")(calibrate_command)


def main() -> None:
    """Entry point of the ``effcc`` script. Exit codes: 0 done, 1 found wanting or our own error, 2 bad input."""
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("EFFCC_DEBUG"))
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="effcc")
    except EffccError as error:
        if debug:
            traceback.print_exc()
        print(f"effcc: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader (a pager, head) has gone: nothing is left to say, also not by the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f"effcc: unexpected {type(error).__name__}: {error}\n"
                f"  at {frame.filename}:{frame.lineno}\n"
                f"  This is a fault of effcc {__version__}. Run again with --debug and send what it prints\n"
                f"  to {REPORT_TO}.",
                file=sys.stderr,
            )
        sys.exit(1)


if __name__ == "__main__":
    main()
