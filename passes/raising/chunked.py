"""A component done in chunks of its independent rows, by a library's products with generated loops between them.

A kernel that never stores a wide tensor computes it again in each of its passes: for a linear layer under a
cross-entropy that is a fourth product of its size. Where a row is too long for one pass but rows are independent, a
chunk of rows is computed as written, all stages after another, and its wide tensors stay in the cache::

    for tokens t in chunks:  Z[t,v] = X W^T    loss[t], P[t,v] from Z    dX[t,d] = P W    dW[v,d] += P^T X

That needs all stages at once. A backward waits for the loss's gradient; if that is a scalar of which the backward's
results are multiples, it is done for 1, in the forward, and the results are scaled when the scalar is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy

from ...ir.cascade import Cascade, Einsum, is_rank, tensor_name
from ...ir.fused_cascade import FusedCascade
from ...ir.graph import Graph
from ..library_products import in_products, product_operands
from .candidates import Candidate, Candidates, NotFused, value_name
from .emit import numeric
from .extract import Extracted, extract
from .group import Early, Traffic
from .homogeneous import degrees
from .ranks import unify_ranks
from .stages import Stage
from .traffic import element_bytes

#: Rows of a chunk at least, for a library's product to be as fast as on the whole; what they are a multiple of; chunks
#: at least.
_LEAST_ROWS, _ROWS, _LEAST_CHUNKS = 256, 64, 4


@dataclass(frozen=True)
class Chunked:
    """All stages of a candidate as one. ``extracted.fused.chunks`` says how they are cut. ``chunk_bytes``: of its
    largest wide tensor, for one chunk; ``wide_bytes``: for all."""

    extracted: Extracted
    stage: Stage
    traffic: Traffic
    early: Early | None
    chunk_bytes: int
    wide_bytes: int


@dataclass(frozen=True)
class Uncut:
    """What chunks of every size have in common. ``sizes``: of the independent ranks; ``row_bytes``: of the largest wide
    tensor."""

    extracted: Extracted
    stage: Stage
    traffic: Traffic
    early: Early | None
    sizes: Mapping[sympy.Symbol, int]
    wide: tuple[str, ...]
    row_bytes: int
    wide_bytes: int


def chunked(candidates: Candidates, candidate: Candidate, chunk_bytes: int) -> Chunked:
    """``chunk_bytes``: what a wide tensor's chunk may have, if that is rows enough. Raises ``NotFused``."""
    if candidate.uncut is None:
        candidate.uncut = _uncut(candidates, candidate)
    whole = candidate.uncut
    chunks = _cut(whole.sizes, max(_LEAST_ROWS, chunk_bytes // whole.row_bytes // _ROWS * _ROWS))
    named = {symbol.name: size for symbol, size in chunks.items()}
    return Chunked(
        replace(whole.extracted, fused=replace(whole.extracted.fused, chunks=named, wide=whole.wide)),
        whole.stage,
        whole.traffic,
        whole.early,
        math.prod(chunks.values()) * whole.row_bytes,
        whole.wide_bytes,
    )


def _uncut(candidates: Candidates, candidate: Candidate) -> Uncut:
    tangents = _Tangents(candidates, candidate)
    einsums = tangents.with_glue(
        {einsum.output: einsum for stage in candidate.stages for einsum in stage.einsums if einsum.output in stage.own}
    )
    names = frozenset(einsum.output for einsum in einsums)
    stage = Stage((0, 0), tuple(einsums), names)
    merged = replace(candidate, stages=[stage])
    wanted = candidates.wanted(stage, merged)
    named, _ = unify_ranks(einsums, candidates.rank_sizes, names)
    extracted = extract(named, wanted, candidates.surroundings(candidate))
    merged.extracted, merged.parts = [extracted], [[]]
    if candidates.leaks(merged) or candidates.unmade(merged):
        raise NotFused("an op outside needs a part of it")
    fused = _in_library_form(extracted.fused)
    wide = {extracted.names[name] for name in candidate.component.wide & names if name in extracted.names}
    rows = _independent_ranks(fused.cascade, wide, {view.tensor for view in fused.outputs})
    if not all(isinstance(size, int) for size in fused.sizes.values()):
        raise NotFused("sizes are not known")
    sizes = {symbol: numeric(fused.sizes[symbol.name]) for symbol in rows}
    component, tensors = candidate.component, candidate.tensors
    largest = max(candidate.space.tensor_elements(name) * element_bytes(tensors[name]) for name in component.wide)
    row_bytes = max(1, largest // max(1, math.prod(sizes.values())))
    return Uncut(
        replace(extracted, fused=fused),
        stage,
        candidates.traffic(stage, wanted, candidate.space, tensors),
        tangents.early(extracted),
        sizes,
        tuple(sorted(wide)),
        row_bytes,
        largest,
    )


def _in_library_form(fused: FusedCascade) -> FusedCascade:
    """Factors of products as tensors, of the type of the product."""
    cascade, dtypes = in_products(fused.cascade), dict(fused.dtypes)
    for einsum in reversed(cascade.einsums):
        for item in einsum.reads if product_operands(einsum) else ():
            if tensor_name(item) in cascade.definitions:
                dtypes.setdefault(tensor_name(item), dtypes[einsum.output])
    return replace(fused, cascade=cascade, dtypes=dtypes)


def _cut(sizes: Mapping[sympy.Symbol, int], rows: int) -> dict[sympy.Symbol, int]:
    """Rank -> its size in a chunk of about ``rows`` rows: the last ranks whole, the first a coordinate at a time."""
    total = math.prod(sizes.values())
    if total < _LEAST_CHUNKS * rows:
        raise NotFused(f"{total} rows are not enough for chunks of {rows}")
    chunks: dict[sympy.Symbol, int] = {}
    for symbol, size in reversed(list(sizes.items())):
        chunks[symbol] = min(size, rows)
        rows = max(1, rows // size)
    return dict(reversed(list(chunks.items())))


def _independent_ranks(cascade: Cascade, wide: set[str], results: set[str]) -> list[sympy.Symbol]:
    """Ranks whose coordinates nothing ties together but sums that only leave the component."""
    read = {tensor_name(item) for einsum in cascade.einsums for item in einsum.reads}
    places: dict[str, set[tuple[sympy.Expr, ...]]] = {}
    for einsum in cascade.einsums:
        for name, indices in ((einsum.output, einsum.indices), *((tensor_name(i), i.args) for i in einsum.reads)):
            places.setdefault(name, set()).add(indices)
    found = [
        symbol
        for symbol in cascade.definitions[min(wide)].kept
        if all(_keeps_apart(einsum, symbol, results - read) for einsum in cascade.einsums)
        and all(len({_position(symbol, indices) for indices in each}) == 1 for each in places.values())
    ]
    if not found or any(not set(found) <= set(cascade.definitions[name].kept) for name in wide):
        raise NotFused("its rows depend on each other")
    return found


def _keeps_apart(einsum: Einsum, symbol: sympy.Symbol, last: set[str]) -> bool:
    plain = all(index.is_Symbol and is_rank(index) for item in einsum.reads for index in item.args)
    coordinate = symbol in einsum.body.xreplace(dict.fromkeys(einsum.reads, sympy.Integer(0))).free_symbols
    if not plain or coordinate or einsum.iterative is not None or symbol not in einsum.space:
        return False
    return symbol in einsum.kept or (einsum.reduction == "sum" and einsum.output in last)


def _position(symbol: sympy.Symbol, indices: tuple[sympy.Expr, ...]) -> int:
    return indices.index(symbol) if symbol in indices else -1


class _Tangents:
    """What of a candidate depends on gradients from outside."""

    def __init__(self, candidates: Candidates, candidate: Candidate) -> None:
        self.graph: Graph = candidates.graph
        self.candidate = candidate
        self.space, self.tensors = candidate.space, candidate.tensors
        self.reached = candidates.reached
        leaves = {name: tensor.nodes[0] for name, tensor in self.tensors.items() if tensor.leaf and tensor.nodes}
        scalar = {node.name for node in self.graph.nodes if node.role == "tangent" and _is_scalar(node.type)}
        outside = {
            name: 1 if node in scalar else None for name, node in leaves.items() if self.reached.get(node, frozenset())
        }
        self.degree = degrees(self.space.einsums, outside)

    def with_glue(self, own: dict[str, Einsum]) -> list[Einsum]:
        """The Einsums with those that bring the scalar to each row, and those that lie between two of them."""
        while True:
            after = self._after(own)
            read = set().union(*(einsum.read_names for einsum in own.values())) - set(own)
            taken = [name for name in read if name in after or self.degree.get(name)]
            taken = [name for name in taken if name in self.space.writer and self._of_rows(self.space.writer[name])]
            if not taken:
                return sorted(own.values(), key=lambda einsum: self.space.position[einsum.output])
            own |= {name: self.space.writer[name] for name in taken}

    def _after(self, own: Mapping[str, Einsum]) -> set[str]:
        """Tensors outside that are computed from the Einsums' results."""
        found = set(own)
        for einsum in self.space.einsums:
            if not found.isdisjoint(einsum.read_names):
                found.add(einsum.output)
        return found - set(own)

    def _of_rows(self, einsum: Einsum) -> bool:
        """Whether each element is computed from one element of each operand: numbers of a row, not a product."""
        return bool(einsum.kept) and all(ranks <= set(einsum.kept) for _, ranks in einsum.read_ranks)

    def early(self, extracted: Extracted) -> Early | None:
        """None if nothing depends on a gradient."""
        scaled = {name: self.degree.get(name, 0) for name in (*extracted.operands, *extracted.results)}
        if not any(degree != 0 for degree in scaled.values()):
            return None
        if any(scaled[name] not in (0, 1) for name in scaled):
            raise NotFused("its gradients are no multiples of a scalar")
        values = [value_name(self.tensors[name]) for name in scaled if scaled[name]]
        tangents = frozenset().union(*(self.reached.get(value, frozenset()) for value in values))
        if len(tangents) != 1:
            raise NotFused("its gradients depend on several gradients from outside")
        if any(self.tensors[name].dtype == "f16" for name in extracted.results if scaled[name]):
            raise NotFused("gradients in float16 would vanish before they are scaled")
        return Early(
            next(iter(tangents)),
            tuple(value_name(self.tensors[name]) for name in extracted.operands if scaled[name]),
            tuple(value_name(self.tensors[name]) for name in extracted.results if scaled[name]),
        )


def _is_scalar(kind: object) -> bool:
    return getattr(kind, "shape", None) == ()
