"""docs/ir.md and docs/passes.md say what the code does."""

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


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks(IR, "ir") + blocks(PASSES, "ir"))
def test_examples_are_sound_graphs(text: str) -> None:
    graph = parse_graph(text)
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph


def test_both_pages_have_examples() -> None:
    assert len(blocks(IR, "ir")) == 2 and len(blocks(PASSES, "ir")) >= 2


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
    described = set(re.findall(r"^### ([\w-]+)$", PASSES, re.MULTILINE))
    assert described == set(found)
    for name, cls in found.items():
        section = PASSES.partition(f"### {name}\n")[2].partition("\n### ")[0]
        for option in pass_options(cls):
            assert f"`{option}`" in section, f"{name}: {option}"
    for name, text in PIPELINES.items():
        assert f"`{name}`" in PASSES and f"`{text}`" in PASSES


def test_the_page_shows_what_the_passes_do() -> None:
    """Each ``before`` block, with the pipeline above it, gives the block after it."""
    shown = re.findall(r"`effcc opt before\.ir -p ([^`]+)`.*?```ir\n(.*?)```.*?```ir\n(.*?)```", PASSES, re.DOTALL)
    assert shown
    for pipeline, before, after in shown:
        assert print_graph(PassManager(parse_pipeline(pipeline)).run(parse_graph(before))) == after
