"""Which groups of dependent reductions in a plan's graphs one kernel could compute, and why the others stay.

The analysis is that of the pass ``fuse-cascades``. It takes about a second a layer; layers that repeat are taken once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

from ..errors import EffccError
from ..formatting import bytes_text
from ..ir.graph import CASCADE_OP, Graph, Location, Symbol
from ..ir.plan import CascadeVerdict
from .lineage import scopes
from .model_source import short_path


def cascade_verdicts(graphs: Iterable[Graph], seconds: float = float("inf")) -> tuple[list[CascadeVerdict], list[str]]:
    """The verdicts, and which graphs were not looked at: they are of no form that the analysis takes, or ``seconds``
    were over."""
    from ..passes.raising.choose import choose
    from ..passes.raising.raise_graph import raise_graph
    from ..passes.repeated_structure import RepeatedStructure

    deadline = time.monotonic() + seconds
    found: dict[tuple[str, str, str], CascadeVerdict] = {}
    skipped: list[str] = []
    for graph in graphs:
        seen: set[str] = set()
        # Under a budget the layers of a plan are written out one by one.
        folded = graph if graph.phase == "joint" else RepeatedStructure().apply(graph)
        for scope, inner in scopes(folded).items():
            name = scope.rpartition("/")[2]
            if name in seen:  # a layer inside another subgraph, again
                continue
            seen.add(name)
            for verdict in _fused(inner):
                found.setdefault((verdict.source, verdict.tensor, verdict.why), verdict)
            if time.monotonic() > deadline:
                skipped.append(f"{inner.name} was not looked at: time was up")
                continue
            try:
                chosen = choose(raise_graph(inner))
            except EffccError as error:
                skipped.append(f"{inner.name} was not looked at: {error.message}")
                continue
            for group in chosen.groups:
                saved = group.traffic.written - group.traffic.fused
                why = f"saves {bytes_text(saved)} of memory traffic: torch.compile fuses it, the pass fuse-cascades too"
                nodes = inner.by_name()
                places = (nodes[name].location for name in group.nodes if name in nodes)
                where = group.location if group.location.file else next((p for p in places if p.file), group.location)
                verdict = _verdict("could be", group.name, why, where, inner)
                found.setdefault((verdict.source, verdict.tensor, why), verdict)
            for refused in chosen.refused:
                verdict = _verdict("not", refused.tensor, _words(refused.why), refused.location, inner)
                found.setdefault((verdict.source, verdict.tensor, verdict.why), verdict)
    # Of a line that is fused somewhere, it does not matter which other groups around it are not.
    answered = {each.source for each in found.values() if each.verdict != "not" and each.source}
    told = [each for each in found.values() if each.verdict != "not" or each.source not in answered]
    order = {"fused": 0, "could be": 1, "not": 2}
    return sorted(told, key=lambda each: (order[each.verdict], each.source)), skipped


def _fused(graph: Graph) -> Iterable[CascadeVerdict]:
    for node in graph.nodes:
        if node.op == CASCADE_OP:
            name = node.args[0].text if node.args and isinstance(node.args[0], Symbol) else ""
            yield _verdict("fused", name, f"one kernel; {node.origin}"[:200], node.location, graph)


def _verdict(verdict: str, tensor: str, why: str, where: Location, graph: Graph) -> CascadeVerdict:
    source = f"{short_path(where.file)}:{where.line}" if where.file else ""
    return CascadeVerdict(verdict=verdict, tensor=tensor, why=why, source=source, module=where.module, graph=graph.name)


def _words(why: str) -> str:
    """The analysis's reason with its figures as people read them."""
    from ..passes.raising.choose import Choice

    if why.startswith("predicted "):
        return f"{why}: less than {Choice.gain} times faster"
    if match := re.fullmatch(r"it would save (-?\d+) bytes only", why):
        saved = int(match[1])
        return f"one kernel would move {bytes_text(-saved)} more" if saved < 0 else f"it saves {bytes_text(saved)} only"
    return why
