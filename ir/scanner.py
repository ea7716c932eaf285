"""Reading position in a text, with errors that show the place. Shared by the parsers of the IR's text forms."""

from __future__ import annotations

import re
from typing import NoReturn

from ..errors import ParseError
from .text import UNESCAPES

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_STRING = re.compile(r'"((?:[^"\\\n]|\\(?:["\\ntr]|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}))*)"')
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)")

#: Longest text that is read, and longest string in it, in characters.
MAX_TEXT = 1 << 28
MAX_STRING = 1 << 20
#: Deepest nesting of tuples, types, expressions and subgraphs.
MAX_DEPTH = 48


class Scanner:
    """A text and a position. Blanks and ``# comments`` are skipped before whatever is read."""

    def __init__(self, text: str, source: str = "") -> None:
        self.text, self.position, self.source, self.depth = text, 0, source, 0
        if len(text) > MAX_TEXT:
            raise ParseError(f"the text has {len(text)} characters; at most {MAX_TEXT} are read", where=source)

    def skip(self) -> int:
        """Move past blanks and comments; the new position."""
        match = _BLANK.match(self.text, self.position)
        self.position = match.end() if match else self.position
        return self.position

    def peek(self, token: str) -> bool:
        return self.text.startswith(token, self.skip())

    def take(self, token: str) -> bool:
        """Read ``token`` if it comes next."""
        if self.text.startswith(token, self.skip()):
            self.position += len(token)
            return True
        return False

    def expect(self, token: str, context: str = "") -> None:
        if not self.take(token):
            self.fail(f"expected '{token}'" + (f" {context}" if context else ""))

    def match(self, pattern: re.Pattern[str]) -> str | None:
        """Read what ``pattern`` matches here, if it does."""
        found = pattern.match(self.text, self.skip())
        if found is None:
            return None
        self.position = found.end()
        return found.group()

    def word(self, word: str) -> bool:
        """Read ``word`` if it comes next and ends there."""
        end = self.skip() + len(word)
        following = self.text[end : end + 1]
        if self.text.startswith(word, self.position) and not (following.isalnum() or following == "_"):
            self.position = end
            return True
        return False

    def string(self) -> str | None:
        """Read a quoted string, if one comes next."""
        if not self.peek('"'):
            return None
        found = _STRING.match(self.text, self.position)
        if found is None:
            self.fail("the string is not closed on its line, or has an unknown escape")
        body = found.group(1)
        if len(body) > MAX_STRING:
            self.fail(f"the string has {len(body)} characters; at most {MAX_STRING} are read")
        self.position = found.end()
        return _ESCAPE.sub(self._unescape, body) if "\\" in body else body

    def _unescape(self, match: re.Match[str]) -> str:
        code = match.group(1)
        if len(code) == 1:
            return UNESCAPES[code]
        value = int(code[1:], 16)
        if value > 0x10FFFF:
            self.fail(f"\\{code} is not a character")
        return chr(value)

    def descend(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH}")

    def ascend(self) -> None:
        self.depth -= 1

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raise ``ParseError`` with line, column, the line and a caret under the place."""
        at = min(self.position if position is None else position, len(self.text))
        line = self.text.count("\n", 0, at) + 1
        start = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        shown = self.text[start : end if end >= 0 else len(self.text)]
        column = at - start
        if column > 100:
            shown, caret = "..." + shown[column - 60 :], 63
        else:
            caret = column
        where = f"{self.source}:{line}:{column + 1}" if self.source else f"line {line}, column {column + 1}"
        excerpt = shown[: caret + 60].replace("\t", " ").rstrip("\r")
        raise ParseError(
            f"{message}\n    {excerpt}\n    {' ' * caret}^",
            where=where,
            remedy="correct the text there; docs/ir.md describes the language",
        )
