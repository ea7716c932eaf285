"""Two launches as one: sums along two ranks over the same tiles.

Attention's gradients walk the same scores twice, once along the keys for the queries and once along the queries for the
keys; a linear layer's walk the same logits. One kernel that goes through all tiles computes both, and each tile once.
What sums over both ranks, such as the gradient of a bias that scores look up, is summed up in the same tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy

from ...ir.cascade import access
from .dataflow import Value
from .launches import Kernel, Launches
from .roles import Caches, crossed_roles, threads

#: Bytes of results that a thread may keep whole while tiles go by.
_LARGEST_WHOLE = 8 << 20


def cross(launches: Launches, kernels: list[Kernel], item_bytes: int) -> None:
    """Put pairs of kernels that walk the same tiles in two directions together, where that keeps all threads busy."""
    for first in list(kernels):
        for second in list(kernels):
            if first not in kernels or second not in kernels:
                continue
            # The one with fewer results keeps them whole.
            if sum(len(r.indices) for r in first.roots) > sum(len(r.indices) for r in second.roots):
                continue
            both = crossed(launches, kernels, first, second)
            if both is not None and crossing_pays(both, launches.sizes, item_bytes):
                _replace(kernels, first, second, both)
    for kernel in list(kernels):
        alone = over_both(launches, kernel)
        if alone is None:
            continue
        for other in [each for each in kernels if each.crossed]:
            whole = joined(kernels, other, alone, launches)
            if whole is not None and crossing_pays(whole, launches.sizes, item_bytes):
                _replace(kernels, kernel, other, whole)
                break
        else:
            if crossing_pays(alone, launches.sizes, item_bytes):
                kernels[kernels.index(kernel)] = alone


def _replace(kernels: list[Kernel], first: Kernel, second: Kernel, both: Kernel) -> None:
    kernels[max(kernels.index(first), kernels.index(second))] = both
    kernels.remove(first if first in kernels else second)


def over_both(launches: Launches, kernel: Kernel) -> Kernel | None:
    """A kernel that sums over two ranks and keeps neither, as one that walks tiles of both."""
    plain = all(
        r.reduction == "sum" and not r.is_state and set(r.reduced) == set(kernel.streamed) for r in kernel.roots
    )
    if kernel.crossed or len(kernel.streamed) != 2 or kernel.finals or not plain or not kernel.inner:
        return None
    return replace(kernel, crossed=True)


def joined(kernels: Sequence[Kernel], crossed: Kernel, alone: Kernel, launches: Launches) -> Kernel | None:
    """One kernel for two that walk the same tiles of two ranks."""
    if set(crossed.streamed) != set(alone.streamed) or not crossed.inner & alone.inner:
        return None
    return _both(kernels, crossed, alone, launches, crossed.streamed)


def crossed(launches: Launches, kernels: Sequence[Kernel], first: Kernel, second: Kernel) -> Kernel | None:
    """One kernel for two that walk the same inner values, each along the rank that the other one keeps.

    Gradients do: that of the queries sums over keys, that of the keys over queries. The first one's results are
    kept whole while all tiles go by; nothing is computed twice. Only plain sums are, which may come in any order.
    """
    if len(first.streamed) != 1 or len(second.streamed) != 1 or first.streamed == second.streamed:
        return None
    outer, inner = first.streamed[0], second.streamed[0]
    plain = all(r.reduction == "sum" and not r.is_state and len(r.reduced) == 1 for r in (*first.roots, *second.roots))
    kept = all(inner in r.indices for r in first.roots) and all(outer in r.indices for r in second.roots)
    both = frozenset((outer, inner))
    ready = all(_is_ready(launches, launches.flow.values[name], both) for name in first.reads | second.reads)
    if first.finals or second.finals or not plain or not kept or not ready or not first.inner & second.inner:
        return None
    return _both(kernels, first, second, launches, (outer, inner))


def _both(
    kernels: Sequence[Kernel], first: Kernel, second: Kernel, launches: Launches, streamed: tuple[sympy.Symbol, ...]
) -> Kernel | None:
    """Two kernels as one; None if one of them, or one between them, reads what the other stores."""
    level, stored = max(first.level, second.level), first.stored | second.stored
    if first.reads & second.stored or second.reads & first.stored:
        return None
    if any(k.level <= level and k.reads & stored for k in kernels):
        return None
    return Kernel(
        streamed,
        level,
        launches.ordered([*first.roots, *second.roots]),
        [],
        stored,
        first.inner | second.inner,
        first.anchor & second.anchor,
        first.reads | second.reads,
        crossed=True,
    )


def _is_ready(launches: Launches, value: Value, streamed: frozenset[sympy.Symbol]) -> bool:
    """Whether a tensor is read from memory whatever ranks a loop walks."""
    if value.is_map:
        return launches.is_settled(access(value.name, value.indices), streamed)
    return not launches.may_be_inner(value)


def crossing_pays(kernel: Kernel, sizes: Mapping[str, int], item_bytes: int) -> bool:
    """Whether the independent coordinates keep all threads busy, and what is kept whole is no burden."""
    roles = crossed_roles(kernel, sizes, Caches(), item_bytes)
    blocks = math.prod(sizes[s.name] for s in roles.grid)
    outer = kernel.streamed[0]
    whole = sum(
        math.prod(sizes[s.name] for s in r.indices if s not in roles.grid) for r in kernel.roots if outer in r.reduced
    )
    if roles.workers:
        blocks = -(-sizes[kernel.streamed[0].name] // roles.steps[kernel.streamed[0]])
    return blocks >= threads() and whole * item_bytes <= _LARGEST_WHOLE
