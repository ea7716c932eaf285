"""The documentation's pages taken apart: headings, links, code blocks, and what the comments before a block say.

A comment before a block says what it is:

    <!-- file: model.py -->    the block is a file of that name, for the blocks that follow
    <!-- slow -->              it captures or compiles a model: run with -m slow
    <!-- exit: 2 -->           the exit code of its last command
    <!-- not run: why -->      it cannot be run here
    <!-- setup ... -->         Python that is run before the block, and not shown

A ``text`` block right behind a Python block is what that prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """``marks``: the comments right before the block. ``behind``: nothing else stands between it and the one before."""

    line: int
    language: str
    text: str
    marks: tuple[str, ...] = ()
    behind: bool = False

    @property
    def setup(self) -> str:
        return "\n".join(mark[5:] for mark in self.marks if mark.startswith("setup"))

    def mark(self, name: str) -> str | None:
        """What follows ``name:`` in a mark, "" for a mark without, None if there is none."""
        for mark in self.marks:
            if mark == name or mark.startswith(f"{name}:"):
                return mark.partition(":")[2].strip()
        return None


@dataclass(frozen=True)
class Page:
    path: Path
    text: str

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def blocks(self) -> list[Block]:
        found: list[Block] = []
        end = -1
        for match in _FENCE.finditer(self.text):
            before = self.text[: match.start()]
            marks: list[str] = []
            while comment := re.search(r"<!-- ((?:(?!-->).)*?) ?-->\s*\Z", before, re.DOTALL):
                marks.append(comment[1])
                before = before[: comment.start()]
            behind = end >= 0 and not self.text[end : len(before)].strip()
            found.append(Block(self.text.count("\n", 0, match.start()) + 1, match[2], match[3], tuple(marks), behind))
            end = match.end()
        return found

    @property
    def anchors(self) -> set[str]:
        """What ``#...`` may name: headings as GitHub and mkdocs write them."""
        plain = _FENCE.sub("", self.text)
        found: dict[str, int] = {}
        anchors = set()
        for heading in re.findall(r"^#+ (.+)$", plain, re.MULTILINE):
            text = re.sub(r"[`*]", "", heading.strip()).lower()
            slug = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text))
            count = found[slug] = found.get(slug, -1) + 1
            anchors.add(slug if count == 0 else f"{slug}-{count}")
        return anchors

    @property
    def links(self) -> list[str]:
        plain = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", self.text))
        return re.findall(r"\]\(([^)\s]+)\)", plain)


def read(path: Path) -> Page:
    return Page(path, path.read_text(encoding="utf-8"))


def matches(shown: str, printed: str) -> str | None:
    """None where every shown line is printed, in order; else the first line that is not. ``...`` is anything, and
    figures may differ: what a page promises is words and shape."""
    lines = [line.rstrip() for line in printed.splitlines()]
    place = 0
    for wanted in shown.splitlines():
        if not wanted.strip() or wanted.strip() == "...":
            continue
        pattern = _pattern(wanted)
        found = next((index for index in range(place, len(lines)) if pattern.fullmatch(lines[index])), None)
        if found is None:
            return wanted
        place = found + 1
    return None


def _pattern(line: str) -> re.Pattern[str]:
    parts = re.split(r"(\.\.\.|\d+(?:[.,]\d+)*|\s+|─+)", line.strip())
    made = []
    for part in parts:
        if part == "...":
            made.append(".*")
        elif part and part[0].isdigit():
            made.append(r"\d+(?:[.,]\d+)*")
        elif part.isspace():
            made.append(r"\s+")
        elif part.startswith("─"):
            made.append("─+")
        else:
            made.append(re.escape(part))
    return re.compile(r"\s*" + "".join(made) + r"\s*")
