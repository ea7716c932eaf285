"""How often a cascade must traverse each fiber: passes per tensor and rank.

"A pass that a cascade performs over a particular fiber of a particular rank and tensor is a traversal of every element
of that fiber. Each time an element must be revisited after visiting every other element of that fiber, there is an
additional pass" (FuseMax, MICRO'24). For a rank r, in text order:

- an Einsum that walks over r is in pass max(pass of its operands that carry r, 1 + pass of its operands that do not);
- an operand without r carries the pass of the reductions over r that it depends on (0 if none), through any number of
  Einsums in between; so does the last element ``T[..., |r|]`` of a tensor that is iterative in r;
- ``passes(T, r)`` is the number of distinct passes of the Einsums that read T, or a tensor derived from T that keeps r.

A step over an iterative rank is one pass of it, since each element needs only the elements before it.

The same fiber may be walked under several names (``X[m]`` here and ``X[n]`` there, or in chunks, ``X[c*B+j]``, where c
is the outer walk). Such names are one *group*, unless some Einsum walks over both at once (self-attention's queries and
keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from ..ir.cascade import Cascade, Einsum, ranks_of, tensor_name

RankGroup = frozenset[sympy.Symbol]


@dataclass(frozen=True)
class RankPasses:
    """The passes of one rank group.

    ``einsum``: line index -> its pass (absent: it does not walk over the group). ``carried``: tensor without the rank
    -> the pass of the reductions over it that it depends on. ``kept``: tensor with the rank -> the pass that writes it.
    """

    group: RankGroup
    einsum: Mapping[int, int]
    carried: Mapping[str, int]
    kept: Mapping[str, int]

    def operand(self, cascade: Cascade, item: AppliedUndef, reader: Einsum) -> tuple[int, bool]:
        """(pass that the operand carries, whether it carries the rank at this access)."""
        name = tensor_name(item)
        definition = cascade.definitions.get(name)
        here = carries(item, self.group)
        if definition is None:
            return (1, True) if here else (0, False)
        if name == reader.output:
            return (1, True) if here else (0, False)
        written_with = _written_with(definition, self.group)
        if here and written_with:
            return self.kept.get(name, 1), True
        if written_with and _is_start_access(definition, item):
            return 0, False
        # Read under another name, at one coordinate, or at the end of its walk: all of the fiber must be there first.
        return (self.kept.get(name, 0) if written_with else self.carried.get(name, 0)), False


def rank_passes(cascade: Cascade, group: RankGroup, settled: Mapping[str, int] | None = None) -> RankPasses:
    """The passes of every Einsum over one rank group.

    ``settled`` overrides what some reduction carries: the pass in which a rewrite will have it ready.
    """
    einsum_pass: dict[int, int] = {}
    carried: dict[str, int] = {}
    kept: dict[str, int] = {}
    found = RankPasses(group, einsum_pass, carried, kept)
    for position, einsum in enumerate(cascade.einsums):
        if einsum.is_start:
            continue
        operands = [found.operand(cascade, item, einsum) for item in einsum.reads]
        if einsum.space & group:
            level = max([1, *(value if here else value + 1 for value, here in operands)])
            einsum_pass[position] = level
            if _written_with(einsum, group):
                kept[einsum.output] = level
            else:
                carried[einsum.output] = (settled or {}).get(einsum.output, level)
        else:
            carried[einsum.output] = max([0, *(value for value, _ in operands)])
    return found


def passes(cascade: Cascade, tensor: str, rank: sympy.Symbol) -> int:
    """``passes(T, r)``. 0 for a tensor that nobody reads over that rank."""
    return _count(cascade, rank_passes(cascade, group_of(cascade, rank)), tensor)


def pass_table(cascade: Cascade) -> dict[str, dict[str, int]]:
    """{tensor: {rank: passes}} for every tensor and each of its ranks, in text order."""
    by_rank: dict[sympy.Symbol, RankPasses] = {}
    known: dict[RankGroup, RankPasses] = {}
    for symbol in _all_ranks(cascade):
        group = group_of(cascade, symbol)
        if group not in known:
            known[group] = rank_passes(cascade, group)
        by_rank[symbol] = known[group]
    return {
        tensor: {symbol.name: _count(cascade, by_rank[symbol], tensor) for symbol in cascade.tensor_ranks[tensor]}
        for tensor in cascade.tensors
    }


@dataclass(frozen=True)
class ForcedPass:
    """One of a tensor's passes over a rank: the Einsums in it, and the results that they had to wait for."""

    number: int
    einsums: tuple[str, ...]
    after: tuple[str, ...]


def forced_passes(cascade: Cascade, tensor: str, rank: sympy.Symbol) -> list[ForcedPass]:
    """What forces each of the ``passes(T, r)``, in order."""
    found = rank_passes(cascade, group_of(cascade, rank))
    table: dict[int, tuple[dict[str, None], dict[str, None]]] = {}
    for position in sorted(_readers(cascade, found, tensor)):
        einsum, level = cascade.einsums[position], found.einsum[position]
        einsums, after = table.setdefault(level, ({}, {}))
        einsums[einsum.output] = None
        for item in einsum.reads:
            value, here = found.operand(cascade, item, einsum)
            if not here and value == level - 1 and value > 0:
                after[tensor_name(item)] = None
    return [ForcedPass(level, tuple(table[level][0]), tuple(table[level][1])) for level in sorted(table)]


def _count(cascade: Cascade, found: RankPasses, tensor: str) -> int:
    return len({found.einsum[position] for position in _readers(cascade, found, tensor)})


def _readers(cascade: Cascade, found: RankPasses, tensor: str) -> set[int]:
    """The Einsums that read the tensor over the group, or a tensor derived from it that keeps the group."""
    by_tensor: dict[str, list[int]] = {}
    for position in found.einsum:
        for name, ranks in cascade.einsums[position].read_ranks:
            if ranks & found.group:
                by_tensor.setdefault(name, []).append(position)
    readers: set[int] = set()
    reached, queue = {tensor}, [tensor]
    while queue:
        for position in by_tensor.get(queue.pop(), ()):
            readers.add(position)
            einsum = cascade.einsums[position]
            if _written_with(einsum, found.group) and einsum.output not in reached:
                reached.add(einsum.output)
                queue.append(einsum.output)
    return readers


def carries(item: AppliedUndef, group: RankGroup) -> bool:
    """Whether an access walks over the rank: one of its indices contains it."""
    return any(ranks_of(index) & group for index in item.args)


def _written_with(einsum: Einsum, group: RankGroup) -> bool:
    return bool(frozenset(einsum.kept) & group)


def _is_start_access(definition: Einsum, item: AppliedUndef) -> bool:
    """``RM[m,0]``: the start of an iterative tensor, which depends on nothing that is walked."""
    step = definition.iterative
    if step is None:
        return False
    return any(index == step + 1 and at == 0 for index, at in zip(definition.indices, item.args, strict=True))


def _all_ranks(cascade: Cascade) -> list[sympy.Symbol]:
    found = dict.fromkeys(cascade.ranks)
    for ranks in cascade.tensor_ranks.values():
        found.update(dict.fromkeys(ranks))
    return list(found)


def group_of(cascade: Cascade, rank: sympy.Symbol) -> RankGroup:
    """The names under which the fiber of this rank is walked."""
    groups: dict[sympy.Symbol, set[sympy.Symbol]] = {symbol: {symbol} for symbol in _all_ranks(cascade)}
    walked = [einsum.space for einsum in cascade.einsums]
    seen: dict[tuple[str, int], sympy.Symbol] = {}

    def note(name: str, indices: tuple[sympy.Expr, ...]) -> None:
        for position, index in enumerate(indices):
            symbol = outer_rank(index)
            if symbol is None:
                continue
            first = seen.setdefault((name, position), symbol)
            left, right = groups[first], groups[symbol]
            if left is right:
                continue
            if not any((space & left) and (space & right) for space in walked):
                left |= right
                for member in right:
                    groups[member] = left

    for einsum in cascade.einsums:
        note(einsum.output, einsum.indices)
    for einsum in cascade.einsums:
        for item in einsum.reads:
            note(tensor_name(item), item.args)
    return frozenset(groups.get(rank, {rank}))


def rank_groups(cascade: Cascade) -> list[RankGroup]:
    """The rank groups, in order of first appearance."""
    return list(dict.fromkeys(group_of(cascade, symbol) for symbol in cascade.ranks))


def outer_rank(index: sympy.Expr) -> sympy.Symbol | None:
    """The rank whose walk is outermost in an affine index: c of ``c*B + j`` (the largest stride)."""
    ranks = sorted(ranks_of(index), key=lambda symbol: symbol.name)
    if len(ranks) <= 1:
        return ranks[0] if ranks else None
    strides = {symbol: index.coeff(symbol) for symbol in ranks}
    symbolic = [symbol for symbol, stride in strides.items() if not stride.is_number]
    if symbolic:
        return symbolic[0]
    largest = max(abs(int(stride)) for stride in strides.values())
    outer = [symbol for symbol, stride in strides.items() if abs(int(stride)) == largest]
    return outer[0] if len(outer) == 1 else None
