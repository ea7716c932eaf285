"""What a pass did to a graph, in counts of ops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .stages import Dump, Stage

_LINE = re.compile(r'^\s*%([\w.]+|"(?:[^"\\]|\\.)*")(?::.*?)? = ([\w.]+|"(?:[^"\\]|\\.)*")\(', re.MULTILINE)


@dataclass(frozen=True)
class Change:
    """Ops (those of subgraphs too) that a pass added, removed, and rewrote in place, counted by op."""

    added: Mapping[str, int]
    removed: Mapping[str, int]
    rewritten: int
    bytes: int

    @property
    def words(self) -> str:
        """``-14 aten.view, -2 aten.clone; +1 aten.full; 30 rewritten``, empty where nothing changed."""
        parts = [_counts("-", self.removed), _counts("+", self.added)]
        if self.rewritten:
            parts.append(f"{self.rewritten} rewritten")
        return "; ".join(part for part in parts if part)


def changes(dump: Dump) -> dict[int, Change]:
    """Stage number -> what it changed, for every stage that is not the first of its graph."""
    found: dict[int, Change] = {}
    before: dict[str, Stage] = {}
    for stage in dump.stages:
        if stage.is_code or stage.failed:
            continue
        earlier = before.get(stage.graph)
        if earlier is not None and not stage.begins:
            found[stage.index] = change(earlier.text(), stage.text()) if stage.changed else Change({}, {}, 0, 0)
        if stage.changed or stage.begins:
            before[stage.graph] = stage
    return found


def change(before: str, after: str) -> Change:
    """The difference of two IR texts. A value is the same if its name is, whatever subgraph it moved to."""
    old, new = _values(before), _values(after)
    gone, come = Counter[str](), Counter[str]()
    rewritten = 0
    for name in {**old, **new}:
        left, right = old.get(name, []), new.get(name, [])
        pairs = min(len(left), len(right))
        rewritten += sum(a != b for a, b in zip(left, right, strict=False))
        gone.update(op for op, _ in left[pairs:])
        come.update(op for op, _ in right[pairs:])
    return Change(dict(come.most_common()), dict(gone.most_common()), rewritten, len(after) - len(before))


def _values(text: str) -> dict[str, list[tuple[str, str]]]:
    """Name -> (op, line without its place) of every value of that name, one a graph."""
    found: dict[str, list[tuple[str, str]]] = {}
    for match in _LINE.finditer(text):
        end = text.find("\n", match.end())
        found.setdefault(match[1], []).append((match[2].strip('"'), text[match.start() : end].strip()))
    return found


def _counts(sign: str, ops: Mapping[str, int], most: int = 3) -> str:
    parts = [f"{sign}{count} {_short(op)}" for op, count in list(ops.items())[:most]]
    rest = sum(list(ops.values())[most:])
    return ", ".join([*parts, f"{sign}{rest} others"] if rest else parts)


def _short(op: str) -> str:
    """``aten.view`` for ``aten.view.default``."""
    return op.removesuffix(".default")
