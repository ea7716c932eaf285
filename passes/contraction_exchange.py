"""Contraction exchange: ``sum_n P_n sum_f a_f V_nf = sum_f a_f (sum_n P_n V_nf)``, where the last inner sum is known.

In attention's backward ``D[m] = sum[n] P[m,n] * DP[m,n]`` walks over keys, with ``DP[m,n] = sum[f] DO[m,f] * V[n,f]``;
but ``sum[n] P[m,n] * V[n,f]`` is the forward's output O, so ``D[m] = sum[f] DO[m,f] * O[m,f]``: FlashAttention's delta.
It needs that the inner contraction is linear in P, nothing else: scores may come from anywhere. Where something is
added to the inner contraction (P has another consumer), the sum over n is needed anyway, and is streamed instead.

rewrite: ``D[m] = sum[n] P[m,n] * DP[m,n]``  ->  ``D[m] = sum[f] DO[m,f] * O[m,f]``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import networkx
import sympy
from sympy.core.function import AppliedUndef

from ..ir.cascade import Cascade, Einsum, access, accesses, is_rank, ranks_of, tensor_name
from .cascade_analysis import rank_groups, rank_passes
from .certificate import Certificate
from .normal_form import normal_form

#: Ranks that no index names alone are tried one by one; an Einsum of more ranks than this is not looked at.
_MAX_RANKS = 6


@dataclass(frozen=True)
class _Found:
    """A sum of ``weight * sum[inner] outside * varying``, and the known Einsum that sums ``weight * varying``.

    ``outside`` holds what divides the wanted sum from the known one as well.
    """

    outside: sympy.Expr
    weight: sympy.Expr
    varying: sympy.Expr
    inner: tuple[sympy.Symbol, ...]
    known: AppliedUndef


def exchange(cascade: Cascade, always: bool = False) -> tuple[Cascade, tuple[Certificate, ...]]:
    """Exchange every contraction whose other order is known, where that saves passes, or ``always``: a part of a larger
    cascade does not show what depends on it. Outputs keep their values."""
    certificates: list[Certificate] = []
    for name in [einsum.output for einsum in cascade.einsums if einsum.reduction == "sum" and not einsum.iterative]:
        einsum = cascade.definitions[name]
        found = _search(cascade, einsum)
        changed = _replace(cascade, cascade.einsums.index(einsum), found) if found else None
        if found and changed and (always or _effort(changed) < _effort(cascade)):
            cascade = changed
            certificates.append(_certificate(einsum, found))
    return cascade, tuple(certificates)


def _effort(cascade: Cascade) -> tuple[int, int]:
    """(passes over all ranks together, the same summed over Einsums)."""
    levels = [rank_passes(cascade, group).einsum.values() for group in rank_groups(cascade)]
    return sum(max(level, default=0) for level in levels), sum(sum(level) for level in levels)


def _search(cascade: Cascade, einsum: Einsum) -> _Found | None:
    factors = sympy.Mul.make_args(einsum.body)
    for factor in factors:
        definition = _contraction(cascade, factor)
        weight = sympy.Mul(*(other for other in factors if other != factor))
        if definition is None or weight * factor != einsum.body or ranks_of(weight) & set(definition.reduced):
            continue
        renamed = definition.body.xreplace(dict(zip(definition.indices, factor.args, strict=True)))
        parts = sympy.Mul.make_args(renamed)
        outside = sympy.Mul(*(part for part in parts if not ranks_of(part) & set(einsum.reduced)))
        varying = sympy.Mul(*(part for part in parts if ranks_of(part) & set(einsum.reduced)))
        for known, ratio in _known(cascade, einsum, weight * varying):
            return _Found(outside * ratio, weight, varying, definition.reduced, known)
    return None


def _contraction(cascade: Cascade, factor: sympy.Expr) -> Einsum | None:
    """The sum that a factor reads, if it is a plain one."""
    definition = cascade.definitions.get(tensor_name(factor)) if isinstance(factor, AppliedUndef) else None
    if definition is None or definition.reduction != "sum" or definition.iterative is not None:
        return None
    return definition


def _known(cascade: Cascade, einsum: Einsum, target: sympy.Expr) -> Iterator[tuple[AppliedUndef, sympy.Expr]]:
    """Einsums that sum the target over the same ranks, up to a factor that does not vary over them."""
    wanted = normal_form(_leaves(cascade, target))
    for other in cascade.einsums:
        if other.reduction != "sum" or other.output == einsum.output or other.iterative is not None:
            continue
        if len(other.reduced) != len(einsum.reduced) or len(other.space) > _MAX_RANKS:
            continue
        body = normal_form(_leaves(cascade, other.body))
        for renaming in _renamings(other, body, einsum, wanted):
            ratio = _ratio(wanted, body.xreplace(renaming), frozenset(einsum.reduced))
            if ratio is not None:
                known = access(other.output, [index.xreplace(renaming) for index in other.indices])
                assert isinstance(known, AppliedUndef)
                yield known, ratio


def _leaves(cascade: Cascade, e: sympy.Expr) -> sympy.Expr:
    """Every map inlined: what is left reads inputs and reductions."""
    while True:
        table: dict[sympy.Expr, sympy.Expr] = {}
        for item in accesses(e):
            definition = cascade.definitions.get(tensor_name(item))
            if definition is None or definition.reduction or definition.iterative or definition.is_start:
                continue
            table[item] = definition.body.xreplace(dict(zip(definition.indices, item.args, strict=True)))
        if not table:
            return e
        e = e.xreplace(table)


def _renamings(
    other: Einsum, body: sympy.Expr, einsum: Einsum, wanted: sympy.Expr
) -> Iterator[dict[sympy.Symbol, sympy.Symbol]]:
    """Renamings of the other Einsum's ranks under which it varies with the same tensors over the same ranks."""
    theirs, ours = frozenset(other.space), ranks_of(wanted)
    if len(theirs) != len(ours):
        return
    goal = [item for item in accesses(wanted) if ranks_of(item) & set(einsum.reduced)]
    varying = [item for item in accesses(body) if ranks_of(item) & set(other.reduced)]
    if Counter(map(tensor_name, goal)) != Counter(map(tensor_name, varying)):
        return
    for bound in _matches(varying, goal, {}):
        free = sorted(theirs - set(bound), key=lambda s: s.name)
        left = sorted(ours - set(bound.values()), key=lambda s: s.name)
        for order in permutations(left):
            renaming = {**bound, **dict(zip(free, order, strict=True))}
            if {renaming[symbol] for symbol in other.reduced} != set(einsum.reduced):
                continue
            if set(goal) == {item.xreplace(renaming) for item in varying}:
                yield renaming


def _matches(
    items: Sequence[AppliedUndef], goal: Sequence[AppliedUndef], bound: dict[sympy.Symbol, sympy.Symbol]
) -> Iterator[dict[sympy.Symbol, sympy.Symbol]]:
    """Bindings of ranks under which each item can be one of ``goal``, told by those indices that are a rank alone."""
    if not items:
        yield bound
        return
    for number, wanted in enumerate(goal):
        if tensor_name(wanted) != tensor_name(items[0]):
            continue
        found = dict(bound)
        for index, target in zip(items[0].args, wanted.args, strict=True):
            if not (index.is_Symbol and is_rank(index)):
                continue
            if not target.is_Symbol or found.setdefault(index, target) != target:
                break
        else:
            if len(set(found.values())) == len(found):
                yield from _matches(items[1:], [*goal[:number], *goal[number + 1 :]], found)


def _ratio(wanted: sympy.Expr, known: sympy.Expr, reduced: frozenset[sympy.Symbol]) -> sympy.Expr | None:
    """``wanted / known`` if that is a product that does not vary over the reduced ranks, and has no exponential."""
    if normal_form(wanted - known) == 0:
        return sympy.Integer(1)
    if wanted.is_Add or known.is_Add:
        return None
    ratio = normal_form(wanted / known)
    if ratio.is_Add or ratio.has(sympy.exp) or ranks_of(ratio) & reduced:
        return None
    return ratio


def _replace(cascade: Cascade, position: int, found: _Found) -> Cascade | None:
    """The cascade with the exchange made, in an order that works; None if the known sum needs this one."""
    einsum = cascade.einsums[position]
    body = found.outside * found.known
    exchanged = Einsum(einsum.output, einsum.indices, body, "sum", found.inner, line=einsum.line)
    return _ordered([*cascade.einsums[:position], exchanged, *cascade.einsums[position + 1 :]])


def _ordered(einsums: list[Einsum]) -> Cascade | None:
    """The Einsums in the given order as far as each can come after what it reads; None if they need each other."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(einsums)))
    writers: dict[str, list[int]] = {}
    for position, einsum in enumerate(einsums):
        writers.setdefault(einsum.output, []).append(position)
    for position, einsum in enumerate(einsums):
        for name in {tensor_name(item) for item in einsum.reads} - {einsum.output}:
            recurrent = any(einsums[writer].iterative for writer in writers.get(name, ()))
            # Inside a recurrence, text order is what says which step is read.
            graph.add_edges_from((w, position) for w in writers.get(name, ()) if not recurrent or w < position)
        graph.add_edges_from((w, position) for w in writers[einsum.output] if w < position)
    if not networkx.is_directed_acyclic_graph(graph):
        return None
    return Cascade(tuple(einsums[p] for p in networkx.lexicographical_topological_sort(graph)))


def _certificate(einsum: Einsum, found: _Found) -> Certificate:
    symbols: dict[sympy.Expr, sympy.Symbol] = {}
    for item in accesses(found.weight * found.varying * found.outside):
        names = {symbol.name for symbol in symbols.values()}
        name, count = tensor_name(item), 1
        while name in names:
            count += 1
            name = f"{tensor_name(item)}_{count}"
        symbols[item] = sympy.Symbol(name, real=True)
    g = (found.weight * found.varying).xreplace(symbols)
    h = found.outside.xreplace(symbols)
    return Certificate(
        einsum.output,
        einsum.reduced[0].name,
        (tensor_name(found.known),),
        "exchange",
        g * h,
        (g,),
        (h,),
        None,
        {"linear": True, "contraction_known": True},
    )
