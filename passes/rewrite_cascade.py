"""Fewest passes for a whole cascade: contractions exchanged, then every rank streamed, until nothing changes.

The result computes the same outputs. Tensors that nothing reads any more are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy

from ..ir.cascade import Cascade, check, tensor_name
from ..ir.monoid import Monoid, part_name
from .cascade_analysis import RankGroup, carries, group_of, rank_passes
from .certificate import Certificate, Refusal
from .contraction_exchange import exchange
from .intervals import Interval, tensor_intervals
from .streaming import stream

#: Sweeps over all ranks; each that changes something lowers a pass, and no cascade has this many.
_MAX_SWEEPS = 12


@dataclass(frozen=True)
class Rewriting:
    """A cascade with fewer passes, the proofs, what was refused, and the combined state of each streamed traversal."""

    cascade: Cascade
    certificates: tuple[Certificate, ...]
    refusals: tuple[Refusal, ...]
    monoids: tuple[Monoid, ...]


def rewrite(cascade: Cascade) -> Rewriting:
    """Move every reduction to the earliest pass that is proven to be possible and numerically sound."""
    outputs = frozenset(cascade.outputs)
    fresh = _name_maker(cascade)
    bounds: dict[str, Interval] = tensor_intervals(cascade)
    current, exchanged = exchange(cascade, fresh)
    certificates: list[Certificate] = list(exchanged)
    monoids: list[Monoid] = []
    refusals: list[Refusal] = []
    for _ in range(_MAX_SWEEPS):
        refusals, changed = [], False
        for group in _groups(current):
            result = stream(current, group, bounds, fresh)
            refusals += result.refusals
            if not result.certificates:
                continue
            changed = True
            current = without_unread(result.cascade, outputs)
            certificates += result.certificates
            monoids += result.monoids
            bounds = {**tensor_intervals(current), **bounds}
        if not changed:
            break
    current = without_unread(current, outputs)
    check(current)
    kept = [*dict.fromkeys(refusals), *_late_outputs(current, outputs)]
    return Rewriting(current, tuple(certificates), tuple(kept), tuple(monoids))


def without_unread(cascade: Cascade, outputs: frozenset[str]) -> Cascade:
    """Drop Einsums whose tensor neither is an output nor is read by another tensor's Einsum that stays."""
    needed: set[str] = set()
    for einsum in reversed(cascade.einsums):
        if einsum.output in outputs or einsum.output in needed:
            needed.update(tensor_name(item) for item in einsum.reads)
            needed.add(einsum.output)
    return Cascade(tuple(einsum for einsum in cascade.einsums if einsum.output in needed))


def _groups(cascade: Cascade) -> list[RankGroup]:
    return list(dict.fromkeys(group_of(cascade, symbol) for symbol in cascade.ranks))


def _late_outputs(cascade: Cascade, outputs: frozenset[str]) -> list[Refusal]:
    """Outputs that keep a rank and need results of reductions over it: their elements can only be written afterwards."""
    found: list[Refusal] = []
    for group in _groups(cascade):
        levels = rank_passes(cascade, group)
        for position, einsum in enumerate(cascade.einsums):
            own = [symbol for symbol in einsum.kept if symbol in group]
            if einsum.output not in outputs or not own or levels.einsum.get(position, 1) == 1:
                continue
            needs = sorted(
                {
                    tensor_name(item)
                    for item in einsum.reads
                    if not carries(cascade, item, group) and levels.operand(cascade, item, einsum)[0] >= 1
                }
            )
            why = f"{einsum.output} keeps {own[0].name}, so each element must be visited again once "
            why += f"{', '.join(needs)} is known" if needs else "what it derives from is known"
            found.append(Refusal(einsum.output, own[0].name, why))
    return found


def _name_maker(cascade: Cascade) -> Callable[[str], str]:
    used = set(cascade.tensors) | {str(s.name) for e in cascade.einsums for s in e.body.free_symbols if _is_constant(s)}

    def fresh(hint: str) -> str:
        name, count = hint, 1
        while name in used or part_name(name) in used:
            count += 1
            name = f"{hint}_{count}"
        used.update((name, part_name(name)))
        return name

    return fresh


def _is_constant(symbol: sympy.Symbol) -> bool:
    return bool(symbol.name[0].isupper())
