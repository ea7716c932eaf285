"""Chains of swaps between two devices: in every layer one expert of a device may change places with one of the other.

Which swaps, in which layers, is one exact choice by dynamic programming from layer to layer: a neighbourhood of
(1 + slots per device squared) to the power of layers placements. It moves whole paths of experts at once, which single
swaps cannot do without first paying for it.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .annealing import move
from .problem import Floats, Ints

#: Most swaps considered in one layer, those of the largest worth by themselves.
_MOST = 160


@compiled
def improve_by_chains(
    slots: Ints, pull: Floats, load: Floats, transitions: Floats, incoming: Floats, loads: Floats, node_of_rank: Ints,
    per_hop: float, per_node_hop: float, per_load: float, sweeps: int, seed: int, stop: Ints,
) -> float:  # fmt: skip
    """Best chain of each pair of devices, until none is worth anything or for ``sweeps`` rounds over all pairs; ends
    early once ``stop[0]`` is not 0. Changes its arrays in place; returns by how much the objective fell."""
    np.random.seed(seed)
    ranks = load.shape[1]
    pairs = ranks * (ranks - 1) // 2
    order = np.arange(pairs)
    clean = np.zeros(pairs, np.int64)
    touched = np.zeros(ranks, np.int64)
    clock = 1
    won = 0.0
    for _ in range(sweeps):
        for index in range(pairs - 1, 0, -1):
            other = np.random.randint(index + 1)
            order[index], order[other] = order[other], order[index]
        found = 0.0
        for index in range(pairs):
            if stop[0] != 0:
                return won
            pair = order[index]
            a, b = 0, pair
            while b >= ranks - 1 - a:
                b -= ranks - 1 - a
                a += 1
            b += a + 1
            if clean[pair] > max(touched[a], touched[b]):
                continue
            worth = _best_chain(
                a, b, slots, pull, load, transitions, incoming, loads, node_of_rank, per_hop, per_node_hop, per_load
            )
            clock += 1
            if worth > 0.0:
                found += worth
                touched[a] = touched[b] = clock
            clean[pair] = clock if worth == 0.0 else 0
        won += found
        if found <= 0.0:
            break
    return won


@compiled
def _best_chain(
    a: int, b: int, slots: Ints, pull: Floats, load: Floats, transitions: Floats, incoming: Floats, loads: Floats,
    node_of_rank: Ints, per_hop: float, per_node_hop: float, per_load: float,
) -> float:  # fmt: skip
    """Apply the best chain between devices a and b if it is worth anything; returns its worth."""
    layers, width = slots.shape
    ranks = load.shape[1]
    per_rank = width // ranks
    most = min(per_rank * per_rank, _MOST)
    together = 2.0 * (per_hop + (per_node_hop if node_of_rank[a] != node_of_rank[b] else 0.0))
    first = np.zeros((layers, most + 1), np.int64)  # slots on a; state 0: no swap
    second = np.zeros((layers, most + 1), np.int64)
    number = np.ones(layers, np.int64)
    best = np.zeros((layers, most + 1))
    came = np.zeros((layers, most + 1), np.int64)
    all_worth = np.empty(per_rank * per_rank)
    for layer in range(layers):
        rest = 0.0
        for rank in range(ranks):
            if rank != a and rank != b:
                rest = max(rest, load[layer, rank])
        before = max(rest, max(load[layer, a], load[layer, b]))
        for i in range(per_rank):
            e = slots[layer, a * per_rank + i]
            for j in range(per_rank):
                f = slots[layer, b * per_rank + j]
                worth = pull[layer, e, b] + pull[layer, f, a] - pull[layer, e, a] - pull[layer, f, b]
                if per_load != 0.0:
                    change = loads[layer, f] - loads[layer, e]
                    after = max(rest, max(load[layer, a] + change, load[layer, b] - change))
                    worth += per_load * (before - after)
                all_worth[i * per_rank + j] = worth
        chosen = np.argsort(all_worth)[all_worth.size - most :]
        number[layer] = most + 1
        own = np.zeros(most + 1)
        for state in range(1, most + 1):
            code = chosen[state - 1]
            first[layer, state] = a * per_rank + code // per_rank
            second[layer, state] = b * per_rank + code % per_rank
            own[state] = all_worth[code]
        if layer == 0:
            best[0] = own
            continue
        counts = transitions[layer - 1]
        top = 0
        for state in range(1, most + 1):
            if best[layer - 1, state] > best[layer - 1, top]:
                top = state
        best[layer, 0] = best[layer - 1, top]
        came[layer, 0] = top
        for state in range(1, most + 1):
            e, f = slots[layer, first[layer, state]], slots[layer, second[layer, state]]
            value, source = best[layer - 1, 0], 0
            for previous in range(1, most + 1):
                c, d = slots[layer - 1, first[layer - 1, previous]], slots[layer - 1, second[layer - 1, previous]]
                candidate = best[layer - 1, previous] + together * (
                    counts[c, e] + counts[d, f] - counts[c, f] - counts[d, e]
                )
                if candidate > value:
                    value, source = candidate, previous
            best[layer, state] = own[state] + value
            came[layer, state] = source
    state = int(np.argmax(best[layers - 1]))
    total = best[layers - 1, state]
    if total <= 1e-9 * (1.0 + abs(total)):
        return 0.0
    for layer in range(layers - 1, -1, -1):
        source = came[layer, state]
        if state > 0:
            one, two = first[layer, state], second[layer, state]
            e, f = slots[layer, one], slots[layer, two]
            slots[layer, one], slots[layer, two] = f, e
            load[layer, a] += loads[layer, f] - loads[layer, e]
            load[layer, b] += loads[layer, e] - loads[layer, f]
            move(layer, e, a, b, transitions, incoming, pull, node_of_rank, per_hop, per_node_hop)
            move(layer, f, b, a, transitions, incoming, pull, node_of_rank, per_hop, per_node_hop)
        state = source
    return float(total)
