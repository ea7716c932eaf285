"""One name for a rank wherever the same fiber is walked.

Every Einsum is written with ranks of its own. Here the rank that a tensor is written with and the rank that it is read
with become one, unless some Einsum walks over both at once (self-attention's queries and keys, which come from one
tensor): then the tensor is read under another name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import sympy

from ...ir.cascade import Einsum, is_rank, rank, tensor_name
from ...ir.types import Size


def unify_ranks(
    einsums: Sequence[Einsum], sizes: Mapping[sympy.Symbol, Size], through: Collection[str] | None = None
) -> tuple[list[Einsum], dict[sympy.Symbol, Size]]:
    """The Einsums with as few ranks as that allows, and the sizes of those.

    Reads that walk over no more than the tensor itself come first: they tie together all tensors of one iteration
    space. An operand of a product adds ranks to a space, and must not decide how that space is called. If ``through``
    is given, only those tensors tie their readers together.
    """
    union = _Union(einsums)
    own: dict[tuple[str, int], sympy.Symbol] = {}
    for einsum in einsums:
        for position, index in enumerate(einsum.indices):
            own[einsum.output, position] = index
    reads = [
        (einsum, item) for einsum in einsums for item in einsum.reads if through is None or tensor_name(item) in through
    ]
    for _, item in sorted(reads, key=lambda read: frozenset(read[1].args) != read[0].space):
        for position, index in enumerate(item.args):
            if not (index.is_Symbol and is_rank(index)):
                continue
            first = own.setdefault((tensor_name(item), position), index)
            if sizes[first] == sizes[index]:
                union.unify(first, index)
    table = {symbol: union.root(symbol) for symbol in union.walked}
    renamed = [rename_ranks(einsum, table) for einsum in einsums]
    return renamed, {root: sizes[root] for root in dict.fromkeys(table.values())}


class _Union:
    def __init__(self, einsums: Sequence[Einsum]) -> None:
        self.parent: dict[sympy.Symbol, sympy.Symbol] = {}
        #: Rank -> the Einsums that walk over it.
        self.walked: dict[sympy.Symbol, set[int]] = {}
        for number, einsum in enumerate(einsums):
            for symbol in einsum.space:
                self.parent[symbol] = symbol
                self.walked.setdefault(symbol, set()).add(number)

    def root(self, symbol: sympy.Symbol) -> sympy.Symbol:
        while self.parent[symbol] != symbol:
            self.parent[symbol] = self.parent[self.parent[symbol]]
            symbol = self.parent[symbol]
        return symbol

    def unify(self, first: sympy.Symbol, second: sympy.Symbol) -> bool:
        a, b = self.root(first), self.root(second)
        if a == b:
            return True
        if self.walked[a] & self.walked[b]:
            return False
        if len(self.walked[a]) < len(self.walked[b]):
            a, b = b, a
        self.parent[b] = a
        self.walked[a] = self.walked[a] | self.walked[b]
        return True


def rename_ranks(einsum: Einsum, table: Mapping[sympy.Symbol, sympy.Symbol]) -> Einsum:
    changes = {old: table[old] for old in einsum.space if table.get(old, old) != old}
    if not changes:
        return einsum
    return replace(
        einsum,
        indices=tuple(index.xreplace(changes) for index in einsum.indices),
        body=einsum.body.xreplace(changes),
        reduced=tuple(changes.get(symbol, symbol) for symbol in einsum.reduced),
    )


#: Names that ranks of a group get in order of appearance.
_LETTERS = "b h m n d f e g k l p q s t u v w x y z".split()


def canonical_ranks(einsums: Iterable[Einsum]) -> dict[sympy.Symbol, sympy.Symbol]:
    """New names for every rank, that do not depend on the old ones."""
    table: dict[sympy.Symbol, sympy.Symbol] = {}
    for einsum in einsums:
        for symbol in (*einsum.kept, *einsum.reduced):
            if symbol not in table:
                number = len(table)
                letter = _LETTERS[number % len(_LETTERS)]
                table[symbol] = rank(letter if number < len(_LETTERS) else f"{letter}{number // len(_LETTERS)}")
    return table
