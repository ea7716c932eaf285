"""The documentation is true: links lead somewhere, every error and pass has its page, and every code block runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Effcc, Result
from documentation import DOCS, PAGES, ROOT, Block, Page, matches, read

NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
#: Languages of blocks that are not run by themselves: the output of the block before, data, and texts in grammars.
SHOWN = {"text", "json", "ir", "cascade", ""}


@pytest.mark.parametrize("name", NAMES)
def test_no_dead_link(name: str) -> None:
    page = read(ROOT / name)
    dead = []
    for link in page.links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in read(target).anchors):
            dead.append(link)
    assert dead == []


def test_the_site_builds_and_every_page_is_in_its_navigation(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra effcc[docs] is not installed")
    pytest.importorskip("material", reason="the extra effcc[docs] is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not included in the" not in done.stderr, done.stderr
    for page in DOCS.rglob("*.md"):
        part = page.relative_to(DOCS).with_suffix("")
        folder = part.parent if part.name == "index" else part
        assert (tmp_path / "site" / folder / "index.html").exists(), page


def all_errors() -> dict[str, type]:
    """Every subclass of EffccError in the package, whether or not it is in errors.py."""
    import effcc
    from effcc.errors import EffccError

    for module in pkgutil.iter_modules([str(ROOT / room) for room in ("codegen/tiles", "codegen/triton_tiles")]):
        if module.name == "errors":
            folder = Path(module.module_finder.path).relative_to(ROOT)  # type: ignore[union-attr]
            importlib.import_module(".".join(("effcc", *folder.parts, "errors")))
    assert effcc.EffccError is EffccError
    found, waiting = {}, [EffccError]
    while waiting:
        cls = waiting.pop()
        found[cls.__name__] = cls
        waiting += cls.__subclasses__()
    return {name: cls for name, cls in found.items() if cls.__module__.startswith("effcc.")}


def test_every_error_has_its_page_and_names_it() -> None:
    pages = {path.stem for path in (DOCS / "errors").glob("*.md")} - {"index"}
    errors = all_errors()
    assert set(errors) == pages
    for name, cls in errors.items():
        error = cls("what happened")
        assert (ROOT / error.docs).is_file()  # type: ignore[attr-defined]
        assert error.__notes__ == [f"effcc docs {name} says more"]  # type: ignore[attr-defined]
        assert name in read(DOCS / "errors" / "index.md").text


def test_a_command_that_fails_names_the_page_and_docs_shows_it(effcc: Effcc) -> None:
    failed = effcc("explain", "missing.effcc")
    assert failed.err.splitlines()[-1] == "  effcc docs PlanError says more"
    assert effcc("docs", "PlanError").out == (DOCS / "errors" / "PlanError.md").read_text()
    assert effcc("docs", "ir").out == (DOCS / "ir.md").read_text()
    assert "did you mean 'errors/PlanError'?" in effcc("docs", "PlanErorr").err
    listed = effcc("docs", "--json").json
    assert listed["errors/PlanError"] == "PlanError" and "index" in listed


# --- every block is run -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples in it, as a clone of the repository has them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _is_slow(block: Block) -> bool:
    return block.mark("slow") is not None


@pytest.mark.parametrize("name", [n for n in NAMES if any(not _is_slow(b) for b in read(ROOT / n).blocks)])
def test_blocks(name: str, folder_of_files: Path, effcc: Effcc) -> None:
    _run(read(ROOT / name), False, folder_of_files, effcc)


@pytest.mark.slow
@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize("name", [n for n in NAMES if any(_is_slow(b) for b in read(ROOT / n).blocks)])
def test_all_blocks_those_that_compile_too(name: str, folder_of_files: Path, effcc: Effcc) -> None:
    _run(read(ROOT / name), True, folder_of_files, effcc)


def test_blocks_that_cannot_be_run_say_why_and_are_few() -> None:
    reasons = [block.mark("not run") for name in NAMES for block in read(ROOT / name).blocks]
    given = [reason for reason in reasons if reason is not None]
    assert all(given) and len(given) <= 8


def _run(page: Page, slow: bool, folder: Path, effcc: Effcc) -> None:
    """The page's blocks in order, as a reader who follows it would run them, in one Python namespace and one folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    for block in page.blocks:
        place = f"{page.name}:{block.line}"
        if block.mark("not run") is not None or (_is_slow(block) and not slow):
            printed = None
            continue
        if block.setup:
            exec(compile(block.setup, f"{place} (setup)", "exec"), names)
        if file := block.mark("file"):
            (folder / file).write_text(block.text)
        elif block.language in ("python", "py"):
            printed = _python(block.text, place, names)
        elif block.language == "console":
            _console(block, place, effcc)
        elif block.language == "sh":
            _shell(block.text, place)
        elif block.language == "text" and block.behind and printed is not None:
            line = matches(block.text, printed)
            assert line is None, f"{place}: not printed: {line!r}\n{printed}"
        else:
            assert block.language in SHOWN | {"python"}, f"{place}: nobody runs {block.language}"


def _python(text: str, place: str, names: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), _without_exit():
        exec(compile(text, place, "exec", dont_inherit=True), names)
    return out.getvalue()


@contextlib.contextmanager
def _without_exit() -> Iterator[None]:
    """A block that calls the command line may end it with an exit code of its own, which it must catch."""
    try:
        yield
    except SystemExit as error:
        pytest.fail(f"the block ends Python with {error.code}")


def _console(block: Block, place: str, effcc: Effcc) -> None:
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert parts[0].strip() == "", f"{place}: output before the first command"
    for number, part in enumerate(parts[1:], start=1):
        command, _, shown = part.partition("\n")
        result = _command(command, effcc)
        wanted = int(block.mark("exit") or 0) if number == len(parts) - 1 else 0
        assert result.code == wanted, f"{place}: {command}\n{result.out}{result.err}"
        line = matches(shown, result.out + result.err)
        assert line is None, f"{place}: {command} does not print {line!r}\n{result.out}{result.err}"


def _command(command: str, effcc: Effcc) -> Result:
    variables, words = {}, shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[0] == "effcc" and not variables:
        return effcc(*words[1:])
    program = [sys.executable, "-m", "effcc.cli"] if words[0] == "effcc" else [sys.executable]
    assert words[0] in ("effcc", "python"), command
    done = subprocess.run([*program, *words[1:]], capture_output=True, text=True, env=os.environ | variables)
    return Result(done.returncode, done.stdout, done.stderr)


def _shell(text: str, place: str) -> None:
    """Set-up commands: not run, but what they name must exist."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = (ROOT / "pyproject.toml").read_text()
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert words[1] in targets, f"{place}: {line}"
        elif "pip" in words:
            for extra in re.findall(r"\[(\w+)\]", line):
                assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), f"{place}: {line}"
        else:
            known = words[0] in ("git", "cd", ".venv/bin/python", ".venv/bin/mkdocs", "effcc")
            assert known, f"{place}: {line}"
