"""Bytes and operations of a stage: as written, and as one kernel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...cost_model.op_classes import packet
from ...ir.cascade import Einsum, Equal, tensor_name
from ...ir.graph import Graph, Ref
from ...ir.types import DTYPES, TensorType
from ..effects import is_view
from .components import Space
from .emit import Tensor, elements
from .group import Traffic
from .stages import Stage

#: Ops that copy what they are given into another layout.
_COPIES = frozenset({"aten.clone", "aten._unsafe_view", "aten.reshape", "aten.contiguous"})


def element_bytes(tensor: Tensor) -> int:
    return DTYPES[tensor.dtype][1]


def is_contraction(einsum: Einsum) -> bool:
    """A sum of products of operands that do not walk over the same ranks: a matrix product."""
    if einsum.reduction != "sum" or len(einsum.reads) < 2:
        return False
    return all(len(item.free_symbols) < len(einsum.space) for item in einsum.reads)


@dataclass(frozen=True)
class TablePrices:
    """What takes as long as so many operations of a matrix product: to look an element up in a table, and to add one to
    it, in a fused kernel and by Inductor's code. ``searched``: for each place of the table, where kernels compare all
    with the index."""

    lookup: int
    sum: int
    written_lookup: int = 0
    written_sum: int = 0
    searched: bool = False

    def fused(self, einsums: Collection[Einsum], space: Space) -> int:
        """What looking tables up, and summing into them, takes in a fused kernel."""
        found = 0
        for einsum in einsums:
            looked, summed = _table_terms(einsum, space, self.searched)
            found += self.lookup * looked + self.sum * summed
        return found

    def written(self, einsums: Collection[Einsum], space: Space, shared: Mapping[str, int]) -> int:
        """What it takes as written: once for all who share it."""
        found = 0
        for einsum in einsums:
            looked, summed = _table_terms(einsum, space, False)
            names = (einsum.output, *map(tensor_name, einsum.reads))
            times = min((shared[name] for name in names if name in shared), default=1)
            found += (self.written_lookup * looked + self.written_sum * summed) // times
        return found


#: Kernels that go to the place of a table which an index names. Measured on attention with T5's bias, 512 tokens, one
#: core of an Intel Xeon with AVX-512 that does 145 operations of fused kernels in a nanosecond: 0.4 to 0.6 ns, 0.4 to
#: 0.7 ns, 1.8 ns and 3.1 ns.
INDEXED = TablePrices(lookup=65, sum=65, written_lookup=200, written_sum=400)
#: Kernels that compare each place of a table with each index.
SEARCHED = TablePrices(lookup=4, sum=100, searched=True)


def _table_terms(einsum: Einsum, space: Space, searched: bool) -> tuple[int, int]:
    """(elements that an Einsum looks up in tables, those that it adds to them)."""
    pairs = [pair for node in einsum.body.atoms(Equal) for pair in (node.args, node.args[::-1])]
    picked = {symbol for symbol, index in pairs if symbol in einsum.space and not index.is_Symbol}
    terms = space.size(einsum.space if searched else einsum.space - picked)
    if picked & set(einsum.reduced):
        return terms, 0
    return 0, terms if picked & set(einsum.kept) and einsum.reduction == "sum" else 0


def operations(einsums: Collection[Einsum], space: Space) -> int:
    """Floating-point operations of the contractions, a multiply-add counted as two."""
    return sum(2 * space.size(einsum.space) for einsum in einsums if is_contraction(einsum))


def other_operations(
    written: Collection[Einsum], fused: Collection[Einsum], space: Space, tensors: Mapping[str, Tensor]
) -> tuple[tuple[str, int, int], ...]:
    """(dtype, operations as written, operations fused) of contractions of other operands than f32."""
    found: dict[str, list[int]] = {}
    for place, einsums in enumerate((written, fused)):
        for einsum in einsums:
            if is_contraction(einsum) and (dtype := product_dtype(einsum, tensors)) != "f32":
                found.setdefault(dtype, [0, 0])[place] += operations([einsum], space)
    return tuple((dtype, *counts) for dtype, counts in sorted(found.items()))  # type: ignore[misc]


def product_dtype(einsum: Einsum, tensors: Mapping[str, Tensor]) -> str:
    """The widest floating type of a contraction's operands: what its products are made in."""
    kinds = {tensors[tensor_name(item)].dtype for item in einsum.reads}
    floating = {kind for kind in kinds if kind.startswith(("f", "bf"))}
    return max(floating or kinds, key=lambda kind: (DTYPES[kind][1], kind))


class Copies:
    """Bytes that a graph copies to lay a matrix product's operands out: heads repeated for grouped queries, transposes.

    Only a copy of several times the memory that it shows counts: another one can be part of the op before it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.by_name()

    def bytes(self, line: int) -> int:
        """What is written and read again before the op at this position of the graph."""
        total = 0
        for name in dict.fromkeys(self.graph.nodes[line].operands()):
            copied, node = 0, self.nodes[name]
            while (is_view(node) or packet(node.op) in _COPIES) and node.args and isinstance(node.args[0], Ref):
                kind = node.type
                if packet(node.op) in _COPIES and isinstance(kind, TensorType):
                    copied = elements(kind.shape) * kind.element_bytes
                node = self.nodes[node.args[0].name]
            shown = node.type
            if isinstance(shown, TensorType) and copied >= 2 * elements(shown.shape) * shown.element_bytes:
                total += 2 * copied
        return total


def traffic(
    stage: Stage,
    wanted: Collection[str],
    space: Space,
    tensors: Mapping[str, Tensor],
    copies: Copies,
    tables: TablePrices,
    shared: Mapping[str, int],
) -> Traffic:
    """What a stage moves. ``wanted`` are the tensors that are needed outside of it.

    As written, a matrix product is a kernel, and so is a library's op that has several inside (attention), and every
    stretch of other ops between them: it reads each tensor once and writes what others need. Wide tensors of an earlier
    stage were kept and are read.
    """

    def size(name: str) -> int:
        return space.tensor_elements(name) * element_bytes(tensors[name])

    own = [einsum for einsum in stage.einsums if einsum.output in stage.own]
    libraries = _libraries(own)
    rest = [einsum for einsum in own if einsum.line not in libraries]
    products = [einsum for einsum in rest if is_contraction(einsum)]
    moved: list[int] = []
    for einsum in products:
        read = {tensor_name(item) for item in einsum.reads}
        moved.append(size(einsum.output) + sum(map(size, read)) + copies.bytes(einsum.line))
    read_by_product = {tensor_name(item) for einsum in products for item in einsum.reads}
    kernels = [[einsum for einsum in own if einsum.line == line] for line in libraries]
    for stretch in (*kernels, *_stretches([einsum for einsum in rest if not is_contraction(einsum)])):
        inside = {einsum.output for einsum in stretch}
        read = {tensor_name(item) for einsum in stretch for item in einsum.reads} - inside
        kept = {name for name in inside if name in wanted or name in read_by_product or _elsewhere(name, own, inside)}
        moved.append(sum(map(size, read | kept)))
    made = {einsum.output for einsum in stage.einsums}
    inputs = {tensor_name(item) for einsum in stage.einsums for item in einsum.reads} - made
    outputs = {name for name in stage.own if name in wanted}
    compulsory = sum(size(name) for name in inputs | outputs)
    flops = operations(own, space), operations(stage.einsums, space) + tables.fused(stage.einsums, space)
    looked_up = tables.written(own, space, shared)
    other = other_operations(own, stage.einsums, space, tensors)
    return Traffic(sum(moved), compulsory, compulsory, *flops, max(moved, default=0), looked_up, other)


def _libraries(einsums: Collection[Einsum]) -> list[int]:
    """Lines of ops that are several Einsums with a matrix product among them: one call of a library each."""
    lines = [einsum.line for einsum in einsums]
    return sorted({einsum.line for einsum in einsums if is_contraction(einsum) and lines.count(einsum.line) > 1})


def _elsewhere(name: str, own: Collection[Einsum], inside: Collection[str]) -> bool:
    return any(
        einsum.output not in inside and any(tensor_name(item) == name for item in einsum.reads) for einsum in own
    )


def _stretches(einsums: Collection[Einsum]) -> list[list[Einsum]]:
    """Einsums that read each other, together."""
    stretches: list[list[Einsum]] = []
    for einsum in einsums:
        reads = {tensor_name(item) for item in einsum.reads}
        near = [s for s in stretches if any(e.output in reads for e in s)]
        merged = [e for s in near for e in s] + [einsum]
        stretches = [s for s in stretches if s not in near] + [merged]
    return stretches
