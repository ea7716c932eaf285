"""The fused cascades of a plan's graphs: how often each tensor is walked over, before and after, with the proof."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..inspection.lineage import scopes
from ..inspection.model_source import short_path
from ..ir.cascade_printer import print_cascade
from ..ir.fused_cascade import FusedCascade
from ..ir.graph import CASCADE_OP, Graph, Symbol

#: Distinct cascades that are worked out again for a page: each takes up to some seconds.
MOST = 8


@dataclass(frozen=True)
class PassCount:
    """How often ``tensor`` is walked over along ``rank``; ``rewritten`` is None where it is gone."""

    tensor: str
    rank: str
    written: int
    rewritten: int | None


@dataclass(frozen=True)
class CascadeView:
    """``calls`` counts the nodes that run it, ``source`` is the line of the first."""

    name: str
    calls: int
    source: str
    einsums: str
    rewritten: str
    passes: tuple[PassCount, ...]
    certificates: tuple[str, ...]
    refused: tuple[str, ...]


def cascade_views(graphs: Iterable[Graph]) -> list[CascadeView]:
    """One view for each distinct cascade, in the order of the graphs."""
    found: dict[str, tuple[FusedCascade, str, int, str]] = {}
    for graph in graphs:
        for inner in scopes(graph).values():
            for name, fused in inner.cascades.items():
                nodes = [n for n in inner.nodes if n.op == CASCADE_OP and n.args and n.args[0] == Symbol(f"@{name}")]
                text = print_cascade(fused.cascade)
                where = next((node.location for node in nodes if node.location), None)
                source = f"{short_path(where.file)}:{where.line}" if where is not None and where.file else ""
                _, first, calls, line = found.get(text, (fused, name, 0, source))
                found[text] = (fused, first, calls + len(nodes), line)
    return [_view(*entry) for entry in list(found.values())[:MOST]]


def _view(fused: FusedCascade, name: str, calls: int, source: str) -> CascadeView:
    from ..passes.cascade_analysis import pass_table
    from ..passes.rewrite_cascade import rewrite

    rewriting = rewrite(fused.cascade)
    after = pass_table(rewriting.cascade)
    counts = [
        PassCount(tensor, rank, count, after.get(tensor, {}).get(rank))
        for tensor, ranks in pass_table(fused.cascade).items()
        for rank, count in ranks.items()
    ]
    return CascadeView(
        name,
        calls,
        source,
        print_cascade(fused.cascade),
        print_cascade(rewriting.cascade),
        tuple(counts),
        tuple(str(certificate) for certificate in rewriting.certificates),
        tuple(f"{refusal.einsum} over {refusal.rank}: {refusal.why}" for refusal in rewriting.refusals),
    )
