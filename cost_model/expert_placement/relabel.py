"""Free improvements: which device carries which set of a layer's experts, where the loads stay as they are."""

from __future__ import annotations

import numpy as np

from .problem import Floats, Ints, Problem, costs
from .transport import assign


def relabel(problem: Problem, slots: Ints) -> Ints:
    """Give each layer's sets of experts to the devices where most tokens come from, or where most of them lie already.
    Sets that share a node stay together on one. Loads do not change; hops and migrations do not grow in sum."""
    slots = slots.copy()
    held = problem.held(slots).astype(np.float64)
    for layer in range(problem.layers):
        likes = _likes(problem, held, layer)
        if not likes.any():
            continue
        order = _matching(problem, likes)
        candidate = slots.copy()
        sets = slots[layer].reshape(problem.ranks, -1)
        candidate[layer] = sets[order].ravel()
        if _hops_and_moves(problem, candidate, layer) < _hops_and_moves(problem, slots, layer):
            slots = candidate
            held[layer] = held[layer][order]
    return slots


def _likes(problem: Problem, held: Floats, layer: int) -> Floats:
    """[devices, sets] tokens that a set would keep on a device, by the layer before, and copies that need not move."""
    likes = np.zeros((problem.ranks, problem.ranks))
    if layer > 0:
        copies = held.sum(axis=1)
        before, here = held[layer - 1] / copies[layer - 1], held[layer] / copies[layer]
        likes += before @ problem.transitions[layer - 1] @ here.T
    if problem.current_held is not None:
        likes += np.minimum(problem.current_held[layer][:, None, :], held[layer][None, :, :]).sum(axis=2)
    return likes


def _matching(problem: Problem, likes: Floats) -> Ints:
    """For each device the set it takes; sets of a node go to one node."""
    nodes, inside = problem.nodes, problem.ranks_per_node
    value = np.zeros((nodes, nodes))
    within = np.zeros((nodes, nodes, inside), np.int64)
    for node in range(nodes):
        for source in range(nodes):
            block = likes[node * inside : (node + 1) * inside, source * inside : (source + 1) * inside]
            within[node, source] = assign(block, 1)
            value[node, source] = block[np.arange(inside), within[node, source]].sum()
    chosen = assign(value, 1)
    return np.concatenate([chosen[node] * inside + within[node, chosen[node]] for node in range(nodes)])


def _hops_and_moves(problem: Problem, slots: Ints, layer: int) -> float:
    """Of a layer and its neighbours, each counted once."""
    low, high = max(layer - 1, 0), min(layer + 2, problem.layers)
    part = Problem(
        problem.loads[low:high], problem.transitions[low : high - 1], problem.ranks, problem.nodes, problem.slots,
        current=None if problem.current is None else problem.current[low:high],
    )  # fmt: skip
    found = costs(part, slots[low:high])
    return found.device + found.node + found.migrated


def align(problem: Problem, slots: Ints) -> Ints:
    """The same placement with the slots of each device in the order of the placement in use, else ascending."""
    out = np.sort(slots.reshape(problem.layers, problem.ranks, -1), axis=2)
    if problem.current is None:
        return out.reshape(slots.shape)
    used = problem.current.reshape(out.shape)
    for layer, rank in np.ndindex(problem.layers, problem.ranks):
        rest = out[layer, rank].tolist()
        row: list[int | None] = []
        for expert in used[layer, rank].tolist():
            row.append(expert if expert in rest else None)
            if expert in rest:
                rest.remove(expert)
        out[layer, rank] = [rest.pop(0) if expert is None else expert for expert in row]
    return out.reshape(slots.shape)
