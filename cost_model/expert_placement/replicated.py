"""Simulated annealing where experts have copies: a slot may take another expert, two slots may change places. Compiled.

The worth of a step is counted along the rows of the transition counts of the experts that it touches.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .problem import Floats, Ints


@compiled
def _change(
    layer: int, expert: int, less: int, more: int, held: Ints, shared: Ints, transitions: Floats, incoming: Floats,
) -> float:  # fmt: skip
    """Hops that fall away (above 0) or come when an expert is gone from place ``less`` and there is one at ``more``
    (-1: nowhere). ``held``: [layers, experts, places] copies; ``shared``: [layers - 1, experts, experts] places where
    two experts of consecutive layers both are."""
    layers, experts, _ = held.shape
    gone = less >= 0 and held[layer, expert, less] == 1
    new = more >= 0 and held[layer, expert, more] == 0
    if not gone and not new:
        return 0.0
    won = 0.0
    for side in range(2):
        there = layer + 1 if side == 0 else layer - 1
        if there < 0 or there >= layers:
            continue
        row = transitions[layer, expert] if side == 0 else incoming[there, expert]
        for other in range(experts):
            count = row[other]
            if count == 0.0:
                continue
            number = shared[layer, expert, other] if side == 0 else shared[there, other, expert]
            after = number
            if gone and held[there, other, less] > 0:
                after -= 1
            if new and held[there, other, more] > 0:
                after += 1
            if number == 0 and after > 0:
                won += count
            elif number > 0 and after == 0:
                won -= count
    return won


@compiled
def _apply(layer: int, expert: int, place: int, step: int, held: Ints, shared: Ints) -> None:
    """One copy more or less at a place."""
    layers, experts, _ = held.shape
    before = held[layer, expert, place]
    held[layer, expert, place] = before + step
    if (before > 0) == (before + step > 0):
        return
    if layer + 1 < layers:
        for other in range(experts):
            if held[layer + 1, other, place] > 0:
                shared[layer, expert, other] += step
    if layer > 0:
        for other in range(experts):
            if held[layer - 1, other, place] > 0:
                shared[layer - 1, other, expert] += step


@compiled
def _busiest(slots: Ints, copies: Ints, loads: Floats, per_rank: int) -> float:
    top = 0.0
    for begin in range(0, slots.size, per_rank):
        total = 0.0
        for index in range(begin, begin + per_rank):
            total += loads[slots[index]] / copies[slots[index]]
        top = max(top, total)
    return top


@compiled
def anneal_copies(
    slots: Ints, held: Ints, shared: Ints, on_node: Ints, shared_nodes: Ints, copies: Ints, current: Ints,
    transitions: Floats, incoming: Floats, loads: Floats, node_of_rank: Ints, home: Ints,
    per_hop: float, per_node_hop: float, per_load: float, per_copy: float, steps: int, hot: float, cold: float, seed:
    int,
) -> float:  # fmt: skip
    """Change ``slots`` and its tables in place; returns by how much the objective fell.

    ``current``: [layers, experts, ranks] copies in the placement in use. ``home``: [layers, experts] the node that an
    expert must stay on, -1 where it may go anywhere.
    """
    np.random.seed(seed)
    layers, width = slots.shape
    ranks = held.shape[2]
    per_rank = width // ranks
    won = 0.0
    cooling = (cold / hot) ** (1.0 / max(steps // 64, 1))
    temperature = hot
    for step in range(steps):
        if step % 64 == 63:
            temperature *= cooling
        layer = np.random.randint(layers)
        one, two = np.random.randint(width), np.random.randint(width)
        a, b = one // per_rank, two // per_rank
        e, f = slots[layer, one], slots[layer, two]
        if e == f or one == two:
            continue
        # half of the time, slot one takes another copy of what is in slot two
        copying = copies[layer, e] > 1 and np.random.randint(2) == 0
        if not copying and a == b:
            continue
        m, n = node_of_rank[a], node_of_rank[b]
        if home[layer, e] >= 0 and not copying and home[layer, e] != n:
            continue
        if home[layer, f] >= 0 and home[layer, f] != m:
            continue
        worth = 0.0
        if per_load != 0.0:
            worth += per_load * _busiest(slots[layer], copies[layer], loads[layer], per_rank)
            slots[layer, one] = f
            if copying:
                copies[layer, e] -= 1
                copies[layer, f] += 1
            else:
                slots[layer, two] = e
            worth -= per_load * _busiest(slots[layer], copies[layer], loads[layer], per_rank)
            slots[layer, one], slots[layer, two] = e, f
            if copying:
                copies[layer, e] += 1
                copies[layer, f] -= 1
        if per_copy != 0.0:
            worth -= per_copy * _moved(layer, f, -1 if copying else b, a, held, current)
            worth -= per_copy * _moved(layer, e, a, -1 if copying else b, held, current)
        if per_hop != 0.0:
            gain = _change(layer, e, a, -1 if copying else b, held, shared, transitions, incoming)
            gain += _change(layer, f, -1 if copying else b, a, held, shared, transitions, incoming)
            worth += per_hop * gain
        if per_node_hop != 0.0:
            if copying:
                gain = _change(layer, e, m, -1, on_node, shared_nodes, transitions, incoming)
                gain += _change(layer, f, -1, m, on_node, shared_nodes, transitions, incoming)
                worth += per_node_hop * gain
            elif m != n:
                gain = _change(layer, e, m, n, on_node, shared_nodes, transitions, incoming)
                gain += _change(layer, f, n, m, on_node, shared_nodes, transitions, incoming)
                worth += per_node_hop * gain
        if worth < 0.0 and np.random.random() >= np.exp(worth / temperature):
            continue
        won += worth
        slots[layer, one] = f
        _apply(layer, e, a, -1, held, shared)
        _apply(layer, f, a, 1, held, shared)
        _apply(layer, e, m, -1, on_node, shared_nodes)
        _apply(layer, f, m, 1, on_node, shared_nodes)
        if copying:
            copies[layer, e] -= 1
            copies[layer, f] += 1
        else:
            slots[layer, two] = e
            _apply(layer, f, b, -1, held, shared)
            _apply(layer, e, b, 1, held, shared)
            _apply(layer, f, n, -1, on_node, shared_nodes)
            _apply(layer, e, n, 1, on_node, shared_nodes)
    return won


@compiled
def _moved(layer: int, expert: int, less: int, more: int, held: Ints, current: Ints) -> int:
    """Copies that must be brought from elsewhere, more than before."""
    change = 0
    if less >= 0 and held[layer, expert, less] > current[layer, expert, less]:
        change -= 1
    if more >= 0 and held[layer, expert, more] >= current[layer, expert, more]:
        change += 1
    return change
