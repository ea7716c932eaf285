"""A group of Einsums that becomes one kernel, where it comes from in the graph, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ...ir.fused_cascade import FusedCascade
from ...ir.graph import Location
from ..rewrite_cascade import Rewriting

#: A place that is not known.
_NOWHERE = Location()


@dataclass(frozen=True)
class Traffic:
    """Bytes moved to and from memory: by the ops as written (a matrix product is a kernel, and so is each stretch of
    other ops between them), by the fused kernel at least, and the compulsory ones (every operand read once, every
    result written once). ``flops_written`` and ``flops_fused`` count contractions; ``other``: those of them, of either,
    whose operands are no f32: (dtype, written, fused); ``largest``: bytes of the written kernel that moves most;
    ``tables_written``: what takes as long as so many of f32 to look tables up (in ``flops_fused`` it is counted)."""

    written: int
    fused: int
    compulsory: int
    flops_written: int = 0
    flops_fused: int = 0
    largest: int = 0
    tables_written: int = 0
    other: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Rest:
    """Graph value ``value`` is result ``result`` of the kernel, summed over its first ``count`` dimensions."""

    value: str
    result: str
    count: int


@dataclass(frozen=True)
class Early:
    """A kernel that computes gradients before the loss's own, the scalar ``tangent``, is known. The ``operands`` that
    depend on it are given as for 1; the ``results`` that do are then multiplied by it."""

    tangent: str
    operands: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """``fused`` is the kernel's whole description; equal layers have equal ``fused``.

    ``operands`` and ``results`` are graph values, in the order of ``fused.operands`` and ``fused.results``. ``nodes``
    are the graph nodes that only this group needed. ``rewriting`` is ``rewrite(fused.cascade)``. ``grid`` are the ranks
    that every output keeps: their coordinates are independent. ``streamed`` are the ranks that the wide tensors have
    beyond the grid: a kernel loops over tiles of them. ``wide`` are the tensors that are never in memory. ``rounded``
    are graph values that eager rounds to a narrower element type, and the kernel does not. ``rests`` are small sums
    that the kernel leaves to be done; ``early`` says that it runs before a gradient that it needs. Groups of one
    ``component`` (a forward and its backward) are made together or not at all: each keeps what others compute again.
    """

    name: str
    fused: FusedCascade
    operands: tuple[str, ...]
    results: tuple[str, ...]
    nodes: tuple[str, ...]
    rewriting: Rewriting
    grid: tuple[sympy.Symbol, ...]
    streamed: tuple[sympy.Symbol, ...]
    wide: tuple[str, ...]
    traffic: Traffic
    rounded: tuple[str, ...] = ()
    location: Location = _NOWHERE
    rests: tuple[Rest, ...] = ()
    component: str = ""
    early: Early | None = None
