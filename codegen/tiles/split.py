"""One streamed kernel as two: parts of the streamed rank at once, then their states merged.

A fiber may be cut anywhere: the states of its parts, merged by the monoid, give what one loop gives. That is for
launches with fewer independent tiles than threads, such as decoding one token over a long cache (FlashDecoding,
split-K). The first program leaves each part's states in memory, the second merges them in order and goes on as the
whole kernel would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from ...ir.cascade import access, accesses, tensor_name
from ...ir.monoid import join
from ...ir.tile import SEQUENTIAL, Carry, Loop, Map, Statement
from .body import Layout
from .dataflow import Value, following
from .launches import Kernel, Launches
from .roles import Caches, Machine, Roles, blocks_of

#: Parts are no shorter than this many tiles of the streamed rank.
_SHORTEST = 2
#: Rows of a tile from which on its products take longer than reading what streams past.
_MANY = 64


@dataclass(frozen=True)
class Parts:
    """``rank`` numbers the parts; each has ``length`` coordinates of the streamed rank, the last one perhaps fewer."""

    rank: sympy.Symbol
    count: int
    length: int

    def name(self, state: str) -> str:
        """The tensor that holds a state of every part."""
        return f"{state}_parts"


def choose_parts(
    kernel: Kernel, roles: Roles, sizes: Mapping[str, int], rank: sympy.Symbol, machine: Machine
) -> Parts | None:
    """How to cut a kernel whose grid leaves workers idle; None to leave it whole."""
    if kernel.crossed or len(roles.streamed) != 1 or not kernel.roots or any(r.recurrence for r in kernel.roots):
        return None
    streamed = roles.streamed[0]
    step, size = roles.steps[streamed], sizes[streamed.name]
    rows = math.prod(roles.steps[s] for s in roles.grid)
    workers = machine.readers if rows < _MANY else machine.workers
    if any(root.reduction == "prod" for root in kernel.roots):
        return None
    chosen = machine.parts if isinstance(machine, Caches) else 0
    if blocks_of(roles, sizes) >= workers and not chosen:
        return None
    wanted = chosen or -(-workers // blocks_of(roles, sizes))
    length = max(-(-size // wanted), _SHORTEST * step)
    length = -(-length // step) * step
    count = -(-size // length)
    return Parts(rank, count, length) if count > 1 else None


def merging(
    launches: Launches, kernel: Kernel, layout: Layout, held: frozenset[str], parts: Parts
) -> tuple[Statement, ...]:
    """The loop over parts: each root becomes its own state joined with the part's, both moved to the new references."""
    roots = {root.name: root for root in kernel.roots}

    def moved(e: sympy.Expr, part: bool) -> sympy.Expr:
        table: dict[sympy.Expr, sympy.Expr] = {}
        for item in accesses(launches.inline(e, frozenset(kernel.streamed))):
            state = launches.flow.state(item)
            if state is None or state.name not in roots:
                continue
            if tensor_name(item) == following(state.name):
                name = following(state.name) if state.name in held else state.name
                table[item] = layout.value(name, state.indices)
            else:
                table[item] = stored(state) if part else layout.value(state.name, state.indices)
        return launches.inline(e, frozenset(kernel.streamed)).xreplace(table)

    def stored(root: Value) -> sympy.Expr:
        return access(parts.name(root.name), (parts.rank, *root.indices))

    body: list[Statement] = []
    for root in kernel.roots:
        own = layout.value(root.name, root.indices)
        if root.reduction is None:
            new = moved(root.body, False)
        elif root.carry is None:
            new = join(root.reduction, own, stored(root))
        else:
            new = join(root.reduction, moved(root.carry, False), moved(root.carry, True))
        if root.name in held:
            body.append(Map(layout.value(following(root.name), root.indices), new))
        else:
            body.append(Carry(own, new))
    for root in kernel.roots:
        if root.name in held:
            target = layout.value(root.name, root.indices)
            body.append(Carry(target, layout.value(following(root.name), root.indices)))
    return (Loop(SEQUENTIAL, parts.rank, 1, tuple(body)),)
