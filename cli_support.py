"""What the commands share: consoles, JSON output, reading plans, files and folders."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import OptionError, OutputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .ir.plan_file import PlanFile

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]


def console() -> Console:
    """Standard output: coloured on a terminal; in a pipe plain, and wide enough that no line is folded."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)


def error_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def heading(out: Console, name: str, rest: str) -> None:
    """A line that begins with a bold name."""
    from rich.text import Text

    out.print(Text.assemble((name, "bold"), rest))


def print_json(value: Any) -> None:
    """``value`` (dataclasses and msgspec structs too) as indented JSON on standard output."""
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    sys.stdout.write(text.decode() + "\n")


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A plain table; the columns named in ``right`` hold numbers. Cells are shown as they are: what looks like rich's
    markup, such as ``f32[2,3]``, may come from a user's file."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    class PlainCells(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    result = PlainCells(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, title_style="bold")
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return result


def open_plan(path: Path, *, validate: bool = True) -> PlanFile:
    """The plan in a file. Raises PlanError if there is none, or it is damaged."""
    from .ir.plan_file import load_plan

    return load_plan(path, validate=validate)


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises OptionError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot read {what} {path}: {error.strerror}", remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} {path} is not text", remedy=f"byte {error.start} is not UTF-8") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises OutputError."""
    from .ir.plan_file import write_atomically

    write_atomically(path, text.encode("utf-8", "surrogatepass"))


def check_writable(path: Path) -> None:
    """Make the folder of an output and see that it can be written, before long work. Raises OutputError."""
    import tempfile

    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder", remedy="name a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to the folder of the output: {error.strerror}",
            where=str(path),
            remedy="choose another with -o",
        ) from error


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Torch logs the traceback of what it then raises, which we show as one error. ``TORCH_LOGS`` brings it back."""
    import logging
    import os
    import warnings

    if os.environ.get("TORCH_LOGS"):
        yield
        return
    import torch  # sets up its loggers when it is loaded

    assert torch is not None
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            # What fell back is listed by the command itself.
            warnings.filterwarnings("ignore", message="effcc: .* run as eager ops")
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def stage(description: str, quiet: bool = False) -> Iterator[None]:
    """Shows on a terminal what is going on, with a spinner, what the work logs of itself (``logs``), and how long it
    took; silent elsewhere."""
    err = error_console()
    if quiet or not err.is_terminal:
        yield
        return
    import time

    from rich.text import Text

    from .logs import watching

    begin = time.perf_counter()
    spinner = err.status(Text(f"{description} ..."))
    with spinner, watching(lambda message: spinner.update(Text(f"{description}: {message}", overflow="ellipsis"))):
        yield
    err.print(f"{description}: {time.perf_counter() - begin:.1f} s", markup=False, style="dim")


@contextlib.contextmanager
def paged() -> Iterator[Console]:
    """Standard output; on a terminal, what is longer than the screen goes through ``$PAGER``, else less."""
    out = console()
    if not out.is_terminal:
        yield out
        return
    with out.capture() as captured:
        yield out
    text = captured.get()
    if text.count("\n") < out.height or not _through_pager(text):
        sys.stdout.write(text)


def _through_pager(text: str) -> bool:
    """Whether the text was shown by a pager. ``PAGER=cat`` switches it off."""
    import os
    import shlex
    import subprocess

    command = shlex.split(os.environ.get("PAGER") or "less")
    try:
        # Of less: leave when all fits, show colours, keep the screen. A user's own LESS has the last word.
        subprocess.run(command, input=text.encode(), env={"LESS": "FRX"} | os.environ, check=False)
    except OSError:
        return False
    return True
