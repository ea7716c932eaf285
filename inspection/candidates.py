"""Which groups of dependent reductions in a plan's graphs one kernel could compute, and why the others stay.

The analysis is that of the pass ``fuse-cascades``. It takes about a second a layer; layers that repeat are taken once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import EffccError
from ..formatting import bytes_text
from ..ir.graph import CASCADE_OP, Graph, Location, Symbol
from .lineage import scopes
from .model_source import short_path


@dataclass(frozen=True)
class Verdict:
    """``tensor`` is the group's largest; ``verdict``: fused (the graph has its kernel), could be, or not. ``why`` says
    what stands in the way, or what is gained. ``graph`` is where it was found first."""

    verdict: str
    tensor: str
    why: str
    source: str
    module: str
    graph: str


def cascade_verdicts(graphs: Iterable[Graph], seconds: float = float("inf")) -> tuple[list[Verdict], list[str]]:
    """The verdicts, and the names of graphs that were not looked at: they are of no form that the analysis takes, or
    ``seconds`` were over."""
    from ..passes.raising.choose import choose
    from ..passes.raising.raise_graph import raise_graph

    deadline = time.monotonic() + seconds
    found: dict[tuple[str, str, str], Verdict] = {}
    skipped: list[str] = []
    for graph in graphs:
        seen: set[str] = set()
        for scope, inner in scopes(graph).items():
            name = scope.rpartition("/")[2]
            if name in seen:  # a layer inside another subgraph, again
                continue
            seen.add(name)
            for verdict in _fused(inner):
                found.setdefault((verdict.source, verdict.tensor, verdict.why), verdict)
            if time.monotonic() > deadline:
                skipped.append(inner.name)
                continue
            try:
                chosen = choose(raise_graph(inner))
            except EffccError as error:
                skipped.append(f"{inner.name} ({error.message})")
                continue
            for group in chosen.groups:
                saved = group.traffic.written - group.traffic.fused
                why = f"saves {bytes_text(saved)} of memory traffic: pass fuse-cascades, option cascades"
                verdict = _verdict("could be", group.name, why, group.location, inner)
                found.setdefault((verdict.source, verdict.tensor, why), verdict)
            for refused in chosen.refused:
                verdict = _verdict("not", refused.tensor, _words(refused.why), refused.location, inner)
                found.setdefault((verdict.source, verdict.tensor, verdict.why), verdict)
    order = {"fused": 0, "could be": 1, "not": 2}
    return sorted(found.values(), key=lambda each: (order[each.verdict], each.source)), skipped


def _fused(graph: Graph) -> Iterable[Verdict]:
    for node in graph.nodes:
        if node.op == CASCADE_OP:
            name = node.args[0].text if node.args and isinstance(node.args[0], Symbol) else ""
            yield _verdict("fused", name, f"one kernel; {node.origin}"[:200], node.location, graph)


def _verdict(verdict: str, tensor: str, why: str, where: Location, graph: Graph) -> Verdict:
    source = f"{short_path(where.file)}:{where.line}" if where.file else ""
    return Verdict(verdict, tensor, why, source, where.module, graph.name)


def _words(why: str) -> str:
    """The analysis's reason with its figures as people read them."""
    from ..passes.raising.choose import Choice

    if why.startswith("predicted "):
        return f"{why}: less than {Choice.gain} times faster"
    if match := re.fullmatch(r"it would save (-?\d+) bytes only", why):
        saved = int(match[1])
        return f"one kernel would move {bytes_text(-saved)} more" if saved < 0 else f"it saves {bytes_text(saved)} only"
    return why
