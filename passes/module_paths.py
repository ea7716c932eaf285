"""Module paths of stretches of nodes: ``model.layers.3`` of ``model.layers.3.mlp`` and ``model.layers.3.norm``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..ir.graph import Node

#: Share of a stretch that lies in one layer when the rest, at its border, goes by the neighbouring layer's path.
MAJORITY = 0.6


def common_module(nodes: Iterable[Node]) -> str:
    """The longest path that all nodes with a module path lie below, strays of a neighbouring layer left out:
    ``layers.3`` for nine ops of ``layers.3`` and one of ``layers.2``."""
    paths = [node.location.module.split(".") for node in nodes if node.location.module]
    prefix: list[str] = []
    while paths and all(len(path) > len(prefix) for path in paths):
        counts = Counter(path[len(prefix)] for path in paths)
        (part, count), *others = counts.most_common()
        inside_layer = bool(prefix) and prefix[-1].isdigit()
        if others and (inside_layer or count < MAJORITY * len(paths)):
            break
        prefix.append(part)
        paths = [path for path in paths if path[len(prefix) - 1] == part]
    return ".".join(prefix)


def rebase_module(path: str, old: str, new: str) -> str:
    """``path`` with its beginning ``old`` replaced by ``new``; as it is when it does not begin so."""
    if not path or not old or not new:
        return path
    if path == old:
        return new
    return new + path[len(old) :] if path.startswith(old + ".") else path
