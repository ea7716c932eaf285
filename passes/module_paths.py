"""Module paths of stretches of nodes: ``model.layers.3`` of ``model.layers.3.mlp`` and ``model.layers.3.norm``."""

from __future__ import annotations

from collections.abc import Iterable

from ..ir.graph import Node


def common_module(nodes: Iterable[Node]) -> str:
    """The longest path that all nodes with a module path lie below."""
    paths = {node.location.module for node in nodes if node.location.module}
    if not paths:
        return ""
    split = [path.split(".") for path in sorted(paths)]
    first, last = split[0], split[-1]
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return ".".join(first[:length])


def rebase_module(path: str, old: str, new: str) -> str:
    """``path`` with its beginning ``old`` replaced by ``new``; as it is when it does not begin so."""
    if not path or not old or not new:
        return path
    if path == old:
        return new
    return new + path[len(old) :] if path.startswith(old + ".") else path
