"""Finding values: by source line, by module path, by size, by name or op."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import OptionError
from ..ir.graph import Graph, Node
from ..ir.type_text import print_type
from ..ir.types import TensorType, TupleType
from ..options import parse_bytes
from .lineage import scopes
from .stages import Dump, Stage


@dataclass(frozen=True)
class Found:
    """A value that was looked for. ``bytes`` is 0 where its size is not a number."""

    stage: int
    graph: str
    scope: str
    name: str
    op: str
    type: str
    bytes: int
    source: str
    module: str

    @property
    def reference(self) -> str:
        """What ``--node`` takes."""
        return f"{self.graph}:%{self.name}"


_SIZE = re.compile(r"\s*(>=|<=|>|<|=)?\s*(\d+(?:\.\d+)?\s*[KMGT]i?B|\d+\s*B)\s*", re.IGNORECASE)
_LINE = re.compile(r"\s*(\S+?\.py)?:?(\d+)\s*")


def find(dump: Dump, query: str, stage: Stage | None = None) -> list[Found]:
    """Values of the last stage of every graph (or of ``stage``) that fit, largest first.

    ``model.py:88`` or ``:88`` is a source line, ``>100MiB`` a size, ``f32[2,256,8]`` a type, ``layers.*.mlp`` a module
    path (what lies below it is found too), ``%17`` a name; anything else is looked for in names, ops and source lines.
    Raises OptionError for a query that is empty.
    """
    if not query.strip():
        raise OptionError("the query is empty", remedy='try model.py:88, ">100MiB", "f32[2,256]" or "layers.*.mlp"')
    fits = _test(query)
    stages = [stage] if stage is not None else list(dump.last().values())
    found = [
        each
        for current in stages
        if current.parsed is not None
        for each in _values(current, current.parsed)
        if fits(each)
    ]
    return sorted(found, key=lambda each: -each.bytes)


def _test(query: str) -> Callable[[Found], bool]:
    if match := _SIZE.fullmatch(query):
        size, sign = parse_bytes(match[2], option="--find"), match[1] or ">="
        compare: dict[str, Callable[[int], bool]] = {
            ">=": lambda given: given >= size,
            "<=": lambda given: given <= size,
            ">": lambda given: given > size,
            "<": lambda given: given < size,
            "=": lambda given: given == size,
        }
        return lambda each: compare[sign](each.bytes)
    if (match := _LINE.fullmatch(query)) and (match[1] or query.lstrip().startswith(":")):
        file, line = match[1] or "", match[2]

        def on_line(each: Found) -> bool:
            place = each.source.partition(' "')[0]
            path, _, number = place.rpartition(":")
            return number == line and (not file or path == file or path.endswith("/" + file.removeprefix("./")))

        return on_line
    if re.fullmatch(r"\w+\[.*\]", query.strip()):
        wanted = query.replace(" ", "")
        return lambda each: each.type.replace(" ", "").startswith(wanted)
    text = query.strip().lower()
    if text.startswith("%"):
        return lambda each: each.name.lower() == text[1:]

    def mentions(each: Found) -> bool:
        module = each.module.lower()
        by_module = fnmatch.fnmatchcase(module, text) or fnmatch.fnmatchcase(module, f"{text}.*")
        return by_module or any(text in part.lower() for part in (each.name, each.op, each.source))

    return mentions


def _values(stage: Stage, graph: Graph) -> Iterator[Found]:
    for scope, inner in scopes(graph).items():
        for node in inner.nodes:
            location = node.location
            text = f' "{location.source}"' if location.source else ""
            yield Found(
                stage=stage.index,
                graph=stage.graph,
                scope=scope,
                name=node.name,
                op=node.op,
                type=print_type(node.type) if node.type is not None else "",
                bytes=_bytes(node),
                source=f"{location.file}:{location.line}{text}" if location.file else "",
                module=location.module,
            )


def _bytes(node: Node) -> int:
    items = node.type.items if isinstance(node.type, TupleType) else (node.type,)
    sizes = [item.bytes for item in items if isinstance(item, TensorType)]
    return sum(size for size in sizes if isinstance(size, int))
