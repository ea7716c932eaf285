"""docs/ir.md, docs/passes.md and the pages of the passes say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from effcc.ir.parser import _ATTRIBUTES, parse_graph
from effcc.ir.printer import print_graph
from effcc.ir.rules import PHASES, ROLES
from effcc.ir.types import DTYPES
from effcc.ir.verifier import verify
from effcc.passes.manager import PassManager
from effcc.passes.pipeline import PIPELINES, all_passes, parse_pipeline, pass_options

DOCS = Path(__file__).resolve().parent.parent / "docs"
IR = (DOCS / "ir.md").read_text(encoding="utf-8")
PASSES = (DOCS / "passes.md").read_text(encoding="utf-8")
PASS_PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((DOCS / "passes").glob("*.md"))}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", [block for page in (IR, PASSES, *PASS_PAGES.values()) for block in blocks(page, "ir")])
def test_examples_are_sound_graphs(text: str) -> None:
    graph = parse_graph(text)
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph


def test_both_pages_have_examples() -> None:
    assert len(blocks(IR, "ir")) == 3 and len(blocks(PASSES, "ir")) >= 2
    assert all(len(blocks(page, "ir")) == 2 for page in PASS_PAGES.values())


def test_tables_are_complete() -> None:
    assert set(re.findall(r"^\| `(\w+)` \| [a-z]", IR, re.MULTILINE)) == set(ROLES)
    listed = {short: name for short, name in re.findall(r"`(\w+)` \| `(\w+)`", IR)}
    assert listed == {short: name for short, (name, _) in DTYPES.items()}
    assert all(phase in IR for phase in PHASES)
    assert set(re.findall(r'^ *[=|] "(\w+)" "\("', IR.partition("attribute  =")[2], re.MULTILINE)) >= {*_ATTRIBUTES} - {
        "role"
    }


def test_every_pass_and_option_is_described() -> None:
    found, _ = all_passes()
    assert set(PASS_PAGES) == set(found)
    for name, cls in found.items():
        assert f"[`{name}`](passes/{name}.md)" in PASSES
        assert PASS_PAGES[name].startswith(f"# {name}\n")
        for option in pass_options(cls):
            assert f"| `{option}` |" in PASS_PAGES[name], f"{name}: {option}"
    for name, text in PIPELINES.items():
        assert f"`{name}`" in PASSES and f"`{text}`" in PASSES


@pytest.mark.parametrize("name", ["passes", *PASS_PAGES])
def test_the_page_shows_what_the_pass_does(name: str) -> None:
    """The ``before`` block, with the pipeline above it, gives the block after it."""
    page = PASSES if name == "passes" else PASS_PAGES[name]
    shown = re.findall(r"`effcc opt before\.ir -p ([^`]+)`.*?```ir\n(.*?)```.*?```ir\n(.*?)```", page, re.DOTALL)
    assert shown
    for pipeline, before, after in shown:
        assert before != after
        assert print_graph(PassManager(parse_pipeline(pipeline)).run(parse_graph(before))) == after
