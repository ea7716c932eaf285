"""Where a cascade makes wide tensors: candidates for fusion.

An Einsum is an *outer* one if it combines ranks that none of its operands has together: ``S[m,n]`` from ``Q[m,d]`` and
``K[n,d]``. (With a single query, ``S[h,n]`` from ``Q[h,d]`` and ``K[h,n,d]`` is the same thing, but for a rank of size
1.) Its result is *wide*, and so is every tensor with both of these ranks that is computed from it, or together with it.
A component is a set of wide tensors that Einsums connect; its *core* are the Einsums that write or read them. What the
core writes beyond wide tensors is narrow: maxima, sums, outputs, gradients.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import Einsum, Equal, ranks_of, tensor_name
from ...ir.types import Size
from .emit import elements, numeric


@dataclass(frozen=True)
class Component:
    """``pair``: the two ranks that make its tensors wide. ``core``: outputs of the core's Einsums, in order."""

    pair: tuple[sympy.Symbol, sympy.Symbol]
    wide: frozenset[str]
    core: tuple[str, ...]


class Space:
    """A cascade with what is asked of it again and again: readers, sizes, ranks."""

    def __init__(self, einsums: Iterable[Einsum], sizes: Mapping[str, Size], tensor_sizes: Mapping[str, int]) -> None:
        self.einsums = tuple(einsums)
        self.sizes = sizes
        self.writer = {einsum.output: einsum for einsum in self.einsums}
        self.readers: dict[str, list[Einsum]] = {}
        for einsum in self.einsums:
            for name in einsum.read_names:
                self.readers.setdefault(name, []).append(einsum)
        self.leaf_elements = tensor_sizes

    @cached_property
    def position(self) -> Mapping[str, int]:
        return {einsum.output: number for number, einsum in enumerate(self.einsums)}

    def size(self, ranks: Iterable[sympy.Symbol]) -> int:
        return elements(self.sizes[rank.name] for rank in ranks)

    def tensor_elements(self, name: str) -> int:
        writer = self.writer.get(name)
        return self.size(writer.kept) if writer is not None else self.leaf_elements.get(name, 0)


def outer_ranks(einsum: Einsum, sizes: Mapping[str, Size]) -> tuple[sympy.Symbol, sympy.Symbol] | None:
    """The largest two ranks that no operand of the Einsum has together, but its result has; None if there are none."""
    operands = _kept_of_operands(einsum)
    if not operands or any(own == set(einsum.kept) for own in operands):
        return None
    best: tuple[int, tuple[sympy.Symbol, sympy.Symbol]] | None = None
    order = list(einsum.kept)
    for at, first in enumerate(order):
        for second in order[at + 1 :]:
            if any(first in own and second in own for own in operands):
                continue
            if not any(first in own for own in operands) or not any(second in own for own in operands):
                continue
            points = numeric(sizes[first.name]) * numeric(sizes[second.name])
            if best is None or points > best[0]:
                best = (points, (first, second))
    return best[1] if best else None


def shared_ranks(einsum: Einsum, sizes: Mapping[str, Size]) -> tuple[sympy.Symbol, sympy.Symbol] | None:
    """A rank that both operands of a contraction share, and the largest one that only one of them has, where that
    operand has them all: scores of a single query, ``S[h,n] = sum[d] Q[h,d] * K[h,n,d]``. None if it is no such."""
    operands = _kept_of_operands(einsum)
    if einsum.reduction != "sum" or len(operands) != 2 or set(einsum.kept) not in operands:
        return None
    short = min(operands, key=len)
    lacking = [symbol for symbol in einsum.kept if symbol not in short]
    common = [symbol for symbol in einsum.kept if symbol in short]
    if not lacking or not common:
        return None

    def size(symbol: sympy.Symbol) -> int:
        return numeric(sizes[symbol.name])

    return max(common, key=size), max(lacking, key=size)


def _kept_of_operands(einsum: Einsum) -> list[set[sympy.Symbol]]:
    """The ranks of its result that each operand has."""
    picked = picked_ranks(einsum)
    return [
        set(einsum.kept) & ranks.union(*(picked.get(symbol, ()) for symbol in ranks)) for _, ranks in einsum.read_ranks
    ]


def picked_ranks(einsum: Einsum) -> dict[sympy.Symbol, frozenset[sympy.Symbol]]:
    """Reduced ranks of which an index tensor picks one element, ``sum[v] where(v == I[t], W[v,d], 0)``, with the
    index's ranks: ``W`` is then read at ``I[t]``, and is no operand of a product."""
    found = {}
    for node in einsum.body.atoms(Equal):
        for symbol, other in (node.args, node.args[::-1]):
            if symbol in einsum.reduced and isinstance(other, AppliedUndef):
                found[symbol] = frozenset().union(*map(ranks_of, other.args))
    return found


def components(space: Space, apart: Container[str] = ()) -> Iterator[Component]:
    """Every component, the one with the largest tensors first. They may overlap. Tensors in ``apart`` do not connect
    the Einsums that read them."""
    seeds = []
    for einsum in space.einsums:
        pair = outer_ranks(einsum, space.sizes) or shared_ranks(einsum, space.sizes)
        if pair is not None:
            seeds.append((space.size(einsum.kept), einsum, pair))
    seen: set[tuple[frozenset[sympy.Symbol], str]] = set()
    for _, einsum, pair in sorted(seeds, key=lambda seed: -seed[0]):
        if (frozenset(pair), einsum.output) in seen:
            continue
        found = _grow(space, einsum, pair, apart)
        seen |= {(frozenset(pair), name) for name in found.wide}
        if any(not _is_wide(space.writer[name], pair) for name in found.core):
            yield found


def _is_wide(einsum: Einsum, pair: tuple[sympy.Symbol, sympy.Symbol]) -> bool:
    return pair[0] in einsum.kept and pair[1] in einsum.kept


def _grow(space: Space, seed: Einsum, pair: tuple[sympy.Symbol, sympy.Symbol], apart: Container[str]) -> Component:
    """All wide tensors that are connected with the seed's."""
    wide = {seed.output}
    core: set[str] = set()
    waiting = [seed]
    while waiting:
        einsum = waiting.pop()
        readers = space.readers.get(einsum.output, ()) if einsum.output not in apart else ()
        for member in (einsum, *readers):
            if member.output in core:
                continue
            core.add(member.output)
            related = [member, *(space.writer.get(tensor_name(item)) for item in member.reads)]
            for other in related:
                if other is not None and _is_wide(other, pair) and other.output not in wide:
                    wide.add(other.output)
                    waiting.append(other)
    order = sorted(core, key=lambda name: space.position[name])
    return Component(pair, frozenset(wide), tuple(order))
