"""What was decided of a graph's cascades, kept between processes: the analysis takes seconds, reading milliseconds."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from .codegen.cascade_op import prepare, prepare_on_gpu
from .codegen.region_store import read_record, record_path, source_digest, write_record
from .codegen.tiles.errors import NotLowerable
from .codegen.tiles.roles import Caches, threads
from .codegen.triton_tiles.target import Target
from .ir.graph import Graph
from .ir.plan import Decision
from .ir.printer import print_graph
from .passes.raising.candidates import Candidates
from .passes.raising.choose import Choice, Refused, candidates_of, choose_among
from .passes.raising.group import Early, Group, Rest
from .passes.raising.prefilter import may_fuse
from .passes.raising.raise_graph import raise_graph
from .passes.raising.reach import within_reach


class Fused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One group that becomes a kernel. ``text`` is the op's; ``operands``, ``results`` and ``model`` (an op of the
    group, whose place in the user's model the kernel takes) are nodes of the graph."""

    name: str
    text: str
    model: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    rests: tuple[Rest, ...]
    source: str
    bytes_written: int
    bytes_fused: int
    certificates: tuple[str, ...]
    early: Early | None = None


class Decisions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``refused``: why the other groups stay as they are; ``schedule``: what was chosen among what."""

    fused: tuple[Fused, ...] = ()
    refused: tuple[str, ...] = ()
    schedule: tuple[Decision, ...] = ()


class Reach(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For each group of values whether kernels could compute it."""

    groups: tuple[bool, ...] = ()


def in_reach(graph: Graph, choice: Choice, groups: Sequence[Sequence[str]]) -> tuple[bool, ...]:
    """For each group of a graph's values whether ``decide`` could make all of them results of kernels; from the cache
    directory if it is there."""
    if not groups or not may_fuse(graph, choice):
        return (False,) * len(groups)
    path = _record_of("reach", print_graph(graph), repr(groups))
    known = read_record(path, Reach)
    if known is None:
        known = Reach(within_reach(raise_graph(graph), groups))
        write_record(path, known)
    return known.groups


def _record_of(*parts: str) -> Path:
    return record_path(hashlib.sha256("\n".join((source_digest(), *parts)).encode()).hexdigest())


class Analysed:
    """A graph with what is worked out of it, for several choices that differ in what they take, not in their rates."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._candidates: Candidates | None = None

    @functools.cached_property
    def text(self) -> str:
        return print_graph(self.graph)

    def candidates(self, choice: Choice) -> Candidates:
        if self._candidates is None or self._candidates.tables != choice.rates.tables:
            self._candidates = candidates_of(raise_graph(self.graph), choice)
        return self._candidates


def decide(analysed: Analysed, choice: Choice, target: Target | None = None) -> Decisions:
    """The decisions for a graph, from the cache directory if they are there. ``target``: the GPU that it is for."""
    if not may_fuse(analysed.graph, choice):
        return Decisions()
    machine = repr(target) if target is not None else f"{Caches.of_this_machine()} {threads()}"
    path = _record_of(analysed.text, repr(choice), machine)
    known = read_record(path, Decisions)
    if known is None:
        known = work_out(analysed, choice, target)
        write_record(path, known)
    return known


def work_out(analysed: Analysed, choice: Choice, target: Target | None = None) -> Decisions:
    chosen = choose_among(analysed.candidates(choice), choice)
    refused = list(chosen.refused)
    texts: dict[str, str] = {}
    for group in chosen.groups:
        try:
            if target is None:
                texts[group.name], _ = prepare(group.fused, group.rewriting)
            else:
                texts[group.name], _ = prepare_on_gpu(group.fused, group.rewriting, target)
        except NotLowerable as error:
            refused.append(Refused(group.name, f"no kernel: {error.message}", group.location))
    taken = supported(chosen.groups, texts, {node.name for node in analysed.graph.nodes})
    return Decisions(
        tuple(_fused(group, texts[group.name]) for group in taken),
        tuple(each.why for each in refused),
        chosen.decisions,
    )


def supported(groups: tuple[Group, ...], with_kernel: dict[str, str], names: set[str]) -> list[Group]:
    """The groups that have kernels and operands; a component's groups all or none, for one that stays as it was written
    needs the wide tensors that the others do without."""
    left = list(groups)
    while True:
        made = names | {name for group in left for name in group.results}
        failed = {g.component for g in left if g.name not in with_kernel or not made.issuperset(g.operands)}
        if not failed:
            return left
        left = [group for group in left if group.component not in failed]


def _fused(group: Group, text: str) -> Fused:
    location = group.location
    return Fused(
        group.name,
        text,
        # What runs before a gradient that it needs is a part of the forward.
        group.nodes[0 if group.early else -1],
        group.operands,
        group.results,
        group.rests,
        f"{location.file}:{location.line}" if location.file else "",
        group.traffic.written,
        group.traffic.fused,
        tuple(str(certificate) for certificate in group.rewriting.certificates),
        group.early,
    )
