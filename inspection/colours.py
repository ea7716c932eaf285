"""Syntax colour of IR, Python and C++ lines: one list of kinds for the terminal, the browser and the report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

#: Kind of a word -> how a terminal shows it. All are from the 16 colours that every terminal has; none alone tells
#: added from removed.
STYLES = {
    "value": "cyan",
    "op": "bold",
    "type": "green",
    "word": "magenta",
    "string": "yellow",
    "place": "dim",
    "comment": "dim italic",
    "number": "",
}

_IR = re.compile(
    r"""(?P<comment>\#(?=\s|$).*$)
    |(?P<place>\bloc\(.*?\)(?=\s\s|$))
    |(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<value>[%@](?:[\w.]+|"(?:[^"\\]|\\.)*"))
    |(?P<op>(?<=\ =\ )[A-Za-z_][\w.]*(?=\())
    |(?P<type>\b[a-z]{1,4}\d[\w]*\[[^\]]*\](?:\{[^}]*\})?(?:@\w+(?::\d+)?)?)
    |(?P<word>^\s*(?:graph|return|alias|repeat|cascade|size|input|output|type|wide)\b
        |\b(?:phase|saved|digest|role|forward|from|region|writes|of|as)\b(?=[=(\ ]))
    |(?P<number>(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]))""",
    re.VERBOSE,
)
_CODE = re.compile(
    r"""(?P<comment>\#.*$|//.*$)
    |(?P<string>[rbf]?"(?:[^"\\]|\\.)*"|[rbf]?'(?:[^'\\]|\\.)*')
    |(?P<word>\b(?:def|class|return|import|from|for|in|if|else|elif|while|with|as|None|True|False|and|or|not|lambda|yield
        |raise|try|except|finally|assert|del|pass|auto|const|static|void|int|long|float|bool|template|struct|extern)\b)
    |(?P<op>\b\w+(?=\())
    |(?P<number>(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]))""",
    re.VERBOSE,
)


def words(line: str, code: bool = False) -> Iterator[tuple[str, str]]:
    """The line cut into (kind, text), kind ``""`` for what has no colour."""
    end = 0
    for match in (_CODE if code else _IR).finditer(line):
        if match.start() > end:
            yield "", line[end : match.start()]
        yield str(match.lastgroup), match[0]
        end = match.end()
    if end < len(line):
        yield "", line[end:]


def coloured(line: str, code: bool = False, style: str = "") -> Text:
    """The line for a terminal."""
    from rich.text import Text

    text = Text(style=style, no_wrap=True, end="")
    for kind, part in words(line, code):
        text.append(part, STYLES.get(kind) or None)
    return text


def short_paths(text: str) -> str:
    """Paths of installed packages without what comes before them, in the ``loc(...)`` of a line."""
    return re.sub(r"(?<=loc\()\S*/(?:site|dist)-packages/", "", text)
