"""``effcc docs``: the documentation in the terminal."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from .cli_support import JsonOption, console, paged, print_json, table
from .errors import OptionError

#: Part of the package: what an error's message names is at hand wherever effcc is.
DOCS = Path(__file__).parent / "docs"


def docs_command(
    page: Annotated[str | None, typer.Argument(help="A page such as ir, options, or an error's name.")] = None,
    json: JsonOption = False,
) -> None:
    """Show a page of the documentation, such as the one that an error's message names.

    Without a page, list them all.
    """
    pages = _pages()
    if page is None:
        if json:
            print_json({name: _title(path) for name, path in pages.items()})
        else:
            rows = table("page", "about")
            for name, path in pages.items():
                rows.add_row(name, _title(path))
            with paged() as out:
                out.print(rows)
        return
    path = _find(pages, page)
    text = path.read_text(encoding="utf-8")
    if json:
        print_json({"page": page, "path": str(path), "text": text})
    elif console().is_terminal:
        from rich.markdown import Markdown

        with paged() as out:
            out.print(Markdown(text))
    else:
        print(text, end="")


def _pages() -> dict[str, Path]:
    """``ir``, ``errors/PlanError``, and so on."""
    found = {path.relative_to(DOCS).with_suffix("").as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
    if not found:
        raise OptionError("the documentation is not installed", remedy="read docs/ in effcc's repository")
    return found


def _find(pages: dict[str, Path], page: str) -> Path:
    """A page by its path or by the last part of it, whatever the case and with or without ``.md``."""
    wanted = page.removeprefix("docs/").removesuffix(".md").lower()
    for name, path in pages.items():
        if wanted in (name.lower(), name.lower().rpartition("/")[2]):
            return path
    names = {name.rpartition("/")[2].lower(): name for name in pages}
    close = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean {names[close[0]]!r}? " if close else ""
    raise OptionError(f"there is no page {page!r}", remedy=f"{hint}effcc docs lists them")


def _title(path: Path) -> str:
    """The page's heading."""
    with path.open(encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("# ")), path.stem)
