"""Fewest passes for a whole cascade: contractions exchanged, then every rank streamed, until nothing changes.

The result computes the same outputs. Tensors that nothing reads any more are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy

from ..ir.cascade import Cascade, check, tensor_name
from ..ir.monoid import Monoid, part_name
from .cascade_analysis import carries, pass_table, rank_groups, rank_passes
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
    """Move every reduction to the earliest pass that is proven to be possible and numerically sound.

    No input is then visited more often than before. Moving a reduction to an earlier pass can cost an input one, if
    something refused must visit it later anyway. Such reductions are found by withholding one, or all that read the
    input, as long as that saves passes.
    """
    before, withheld = _input_passes(cascade), frozenset[str]()
    result, moved = _sweep(cascade, withheld)
    while moved:
        now = _input_passes(result.cascade)
        lost = {name for name, rank in now if now[name, rank] > before[name, rank]}
        if not lost:
            break
        choices = [frozenset({name}) for name in sorted(moved)]
        choices += [moved & _derived(cascade, name) for name in sorted(lost)] + [moved]
        # Each round withholds more, so this ends.
        sets = [withheld | choice for choice in dict.fromkeys(choices) if choice]
        trials = [(each, *_sweep(cascade, each)) for each in sets]
        withheld, result, moved = min(
            trials, key=lambda trial: (sum(_input_passes(trial[1].cascade).values()), len(trial[0]))
        )
    check(result.cascade)
    return result


def _sweep(cascade: Cascade, withheld: frozenset[str]) -> tuple[Rewriting, frozenset[str]]:
    """The rewriting that leaves ``withheld`` reductions in their passes; and which of the cascade's it moved."""
    outputs, names = frozenset(cascade.outputs), frozenset(cascade.definitions)
    fresh = _name_maker(cascade)
    bounds: dict[str, Interval] = tensor_intervals(cascade)
    current, exchanged = exchange(cascade)
    certificates: list[Certificate] = list(exchanged)
    monoids: list[Monoid] = []
    moved: set[str] = set()
    refusals: list[Refusal] = []
    for _ in range(_MAX_SWEEPS):
        refusals, changed = [], False
        for group in rank_groups(current):
            result = stream(current, group, bounds, fresh, withheld)
            refusals += [replace(refusal, einsum=_origin(refusal.einsum, names)) for refusal in result.refusals]
            if not result.certificates:
                continue
            changed = True
            current = without_unread(result.cascade, outputs)
            certificates += result.certificates
            monoids += result.monoids
            moved |= result.moved
            bounds = {**tensor_intervals(current), **bounds}
        if not changed:
            break
    current = without_unread(current, outputs)
    kept = (*dict.fromkeys(refusals), *_late_outputs(current, outputs))
    return Rewriting(current, tuple(certificates), kept, tuple(monoids)), frozenset(moved) & names


def _origin(name: str, names: frozenset[str]) -> str:
    """The tensor of the cascade as written that a new one, ``NAME_...``, was made for."""
    return max((each for each in names if name == each or name.startswith(f"{each}_")), key=len, default=name)


def without_unread(cascade: Cascade, outputs: frozenset[str]) -> Cascade:
    """Drop Einsums whose tensor neither is an output nor is read by another tensor's Einsum that stays."""
    needed: set[str] = set()
    for einsum in reversed(cascade.einsums):
        if einsum.output in outputs or einsum.output in needed:
            needed.update(tensor_name(item) for item in einsum.reads)
            needed.add(einsum.output)
    return Cascade(tuple(einsum for einsum in cascade.einsums if einsum.output in needed))


def _input_passes(cascade: Cascade) -> dict[tuple[str, str], int]:
    return {
        (name, rank): count
        for name, ranks in pass_table(cascade).items()
        if name in cascade.inputs
        for rank, count in ranks.items()
    }


def _derived(cascade: Cascade, tensor: str) -> set[str]:
    """Every tensor that is computed from this one."""
    found = {tensor}
    for einsum in cascade.einsums:
        if any(tensor_name(item) in found for item in einsum.reads):
            found.add(einsum.output)
    return found


def _late_outputs(cascade: Cascade, outputs: frozenset[str]) -> list[Refusal]:
    """Outputs that keep a rank and need results of reductions over it: their elements can only be written later."""
    found: list[Refusal] = []
    for group in rank_groups(cascade):
        levels = rank_passes(cascade, group)
        for position, einsum in enumerate(cascade.einsums):
            own = [symbol for symbol in einsum.kept if symbol in group]
            if einsum.output not in outputs or not own or levels.einsum.get(position, 1) == 1:
                continue
            needs = sorted(
                {
                    tensor_name(item)
                    for item in einsum.reads
                    if not carries(item, group) and levels.operand(cascade, item, einsum)[0] >= 1
                }
            )
            why = f"{einsum.output} keeps {own[0].name}, so each element must be visited again once "
            why += (
                f"{', '.join(needs)} {'is' if len(needs) == 1 else 'are'} known" if needs else "its operands are known"
            )
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
