"""What each layer may do: options taken from the best cuts, with saved bytes, transient peak, and seconds.

An option of a block is what some best cut keeps of the block's values. Blocks of one kind share their options: what a
cut keeps of any of them is offered to all. Memory is taken at moments: the beginning of the backward (whatever is saved
lives there), and each block's own backward, where it holds what earlier blocks have saved, gradients so far, and its
own transient values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import Block
from .candidates import Candidate, Key, bytes_on_host
from .host_link import HostLink
from .problem import JointProblem
from .simulate import Entry
from .token_shares import Shares


@dataclass(frozen=True)
class Option:
    """``saved`` values of one block; ``transient``: the most bytes in use during the block's own backward, without what
    earlier blocks have saved; ``seconds``: run again, and writing what is kept; where nothing runs beside copies, those
    too."""

    saved: frozenset[int]
    swapped: frozenset[int]
    saved_bytes: int
    swapped_bytes: int
    transient: int
    seconds: float
    #: Of ``swapped``, what is swapped for some tokens only.
    shares: Shares = frozenset()


@dataclass(frozen=True)
class Moments:
    """``start``: bytes at the most crowded moment where all that is saved lives, without the saved bytes.
    ``forward_seconds`` and ``backward_seconds`` are those of each block."""

    start: int
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]


def block_of_entries(problem: JointProblem, blocks: Sequence[Block]) -> dict[int, int]:
    """Op -> position of its block. An op of the backward belongs to the layer whose module it differentiates, else to
    that of the op before it; before the first such, to the last block."""
    owner = {index: block.position for block in blocks for index in block.ops}
    names = {block.name: block.position for block in blocks}
    value_owner = {v: block.position for block in blocks for v in block.values}
    layers_named = any("." in block.name for block in blocks)
    current = len(blocks) - 1
    for op in problem.ops:
        if op.forward:
            continue
        parts = op.module.split(".")
        named = next(
            (
                names[".".join(parts[:end])]
                for end in range(len(parts), 0, -1)
                if op.module and ".".join(parts[:end]) in names
            ),
            None,
        )
        if named is None and not layers_named:
            made = [value_owner[v] for v in op.reads if v in value_owner]
            named = min(current, max(made)) if made else None
        if named is not None:
            current = named
        owner[op.index] = current
    return owner


def options_of(
    problem: JointProblem,
    blocks: Sequence[Block],
    uniform: Sequence[Candidate],
    crossing: frozenset[int],
    link: HostLink | None = None,
) -> tuple[list[list[Option]], Moments]:
    """Options of each block from candidates that treat all blocks by one price, and the moments they meet in."""
    owner = block_of_entries(problem, blocks)
    size = problem.values
    count = len(blocks)
    own = [frozenset(block.values) for block in blocks]
    start: int | None = None
    table: list[dict[Key, Option]] = [{} for _ in blocks]
    for candidate in uniform:
        run = candidate.simulation
        saved = [frozenset(candidate.saved & values) for values in own]
        bytes_ = [sum(size[v].bytes for v in each) for each in saved]
        earlier = [sum(bytes_[:i]) for i in range(count)]
        peaks = [0] * count
        crowded = 0
        held = sum(bytes_)
        first = next((i for i, entry in enumerate(run.entries) if entry.backward), len(run.entries))
        needed_in = _needed_in(run.entries, owner)
        for position, entry in enumerate(run.entries):
            if not entry.backward:
                crowded = run.memory[position] if position == first - 1 else crowded
                continue
            asked_by = needed_in[position]
            if asked_by == count - 1:
                crowded = max(crowded, run.memory[position])
            peaks[asked_by] = max(peaks[asked_by], run.memory[position])
        start = crowded - held if start is None else min(start, crowded - held)
        again = run.recomputed
        for i, block in enumerate(blocks):
            transient = peaks[i] - earlier[i]
            seconds = sum(problem.ops[index].seconds * run.portion(index) for index in block.ops if index in again)
            seconds += sum(size[v].keep_seconds for v in saved[i])
            away = candidate.swapped & own[i]
            seconds += sum(size[v].keep_seconds for v in away)
            if link is not None and not link.overlapped:
                seconds += sum(link.both_seconds(bytes_on_host(size[v], candidate.shares)) for v in away)
            shares = frozenset((v, quarters) for v, quarters in candidate.shares if v in away)
            moved = sum(bytes_on_host(size[v], shares) for v in away)
            option = Option(saved[i], away, bytes_[i], moved, transient, seconds, shares)
            known = table[i].get((saved[i], away, shares))
            if known is None or option.transient < known.transient:
                table[i][saved[i], away, shares] = option
    options = [_useful(_with_crossing(list(found.values()), crossing)) for found in table]
    forward = [0.0] * count
    backward = [0.0] * count
    for op in problem.ops:
        (forward if op.forward else backward)[owner[op.index]] += op.seconds
    return options, Moments(start or 0, tuple(forward), tuple(backward))


def _needed_in(entries: Sequence[Entry], owner: dict[int, int]) -> list[int]:
    """For each entry of the backward the block that it belongs to: of an op that runs again, the one whose backward
    asked for it, by the next op that does not."""
    found = [0] * len(entries)
    block = 0
    for position in range(len(entries) - 1, -1, -1):
        if not entries[position].backward:
            break
        if not entries[position].again:
            block = owner[entries[position].op]
        found[position] = block
    return found


def _with_crossing(options: list[Option], crossing: frozenset[int]) -> list[Option]:
    """Options that keep what later layers need as much as the fastest one does: without it their backward would run
    this layer again, and its memory would not be this layer's own."""
    fastest = min(options, key=lambda o: o.seconds)
    wanted = (fastest.saved | fastest.swapped) & crossing
    return [option for option in options if option.saved | option.swapped >= wanted] or [fastest]


def _useful(options: list[Option]) -> list[Option]:
    """Those that no other beats in seconds, saved and swapped bytes and transient peak, fastest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.seconds, o.saved_bytes, o.swapped_bytes, o.transient)):
        if not any(
            o.saved_bytes <= option.saved_bytes
            and o.swapped_bytes <= option.swapped_bytes
            and o.transient <= option.transient
            for o in kept
        ):
            kept.append(option)
    return kept
