"""Simulated annealing over swaps of two experts of a layer, for placements without replicas.

A swap's worth is read off a table in constant time; only accepted swaps change it, in the layers before and after.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .problem import Floats, Ints


@compiled
def move(
    layer: int, expert: int, old: int, new: int, transitions: Floats, incoming: Floats, pull: Floats,
    node_of_rank: Ints, per_hop: float, per_node_hop: float,
) -> None:  # fmt: skip
    """Tell the layers before and after that an expert moves from device ``old`` to ``new``."""
    layers, experts, ranks = pull.shape
    far = per_node_hop != 0.0 and node_of_rank[old] != node_of_rank[new]
    for side in range(2):
        if side == 0:
            if layer + 1 >= layers:
                continue
            row, there = transitions[layer, expert], layer + 1
        else:
            if layer == 0:
                continue
            row, there = incoming[layer - 1, expert], layer - 1
        for other in range(experts):
            count = row[other]
            if count == 0.0:
                continue
            pull[there, other, old] -= per_hop * count
            pull[there, other, new] += per_hop * count
            if far:
                for rank in range(ranks):
                    if node_of_rank[rank] == node_of_rank[old]:
                        pull[there, other, rank] -= per_node_hop * count
                    elif node_of_rank[rank] == node_of_rank[new]:
                        pull[there, other, rank] += per_node_hop * count


@compiled
def anneal(
    slots: Ints, pull: Floats, load: Floats, transitions: Floats, incoming: Floats, loads: Floats, node_of_rank: Ints,
    per_hop: float, per_node_hop: float, per_load: float, steps: int, hot: float, cold: float, seed: int,
) -> float:  # fmt: skip
    """Change ``slots``, ``pull`` and ``load`` in place; the temperature falls from ``hot`` to ``cold`` geometrically.

    ``incoming``: the transitions, transposed. Returns by how much the objective fell.
    """
    np.random.seed(seed)
    layers, width = slots.shape
    ranks = load.shape[1]
    per_rank = width // ranks
    won = 0.0
    cooling = (cold / hot) ** (1.0 / max(steps // 256, 1))
    temperature = hot
    for step in range(steps):
        if step % 256 == 255:
            temperature *= cooling
        layer = np.random.randint(layers)
        one, two = np.random.randint(width), np.random.randint(width)
        a, b = one // per_rank, two // per_rank
        if a == b:
            continue
        e, f = slots[layer, one], slots[layer, two]
        worth = pull[layer, e, b] + pull[layer, f, a] - pull[layer, e, a] - pull[layer, f, b]
        change = loads[layer, f] - loads[layer, e]
        if per_load != 0.0 and change != 0.0:
            before = after = 0.0
            for rank in range(ranks):
                value = load[layer, rank]
                before = max(before, value)
                if rank == a:
                    value += change
                elif rank == b:
                    value -= change
                after = max(after, value)
            worth += per_load * (before - after)
        if worth < 0.0 and np.random.random() >= np.exp(worth / temperature):
            continue
        won += worth
        slots[layer, one], slots[layer, two] = f, e
        load[layer, a] += change
        load[layer, b] -= change
        move(layer, e, a, b, transitions, incoming, pull, node_of_rank, per_hop, per_node_hop)
        move(layer, f, b, a, transitions, incoming, pull, node_of_rank, per_hop, per_node_hop)
    return won
