"""Placements to begin a search with, made of exact assignments of one layer at a time. Without replicas."""

from __future__ import annotations

import numpy as np

from .problem import Floats, Ints, Problem
from .tables import pulls_of_layer, slots_of_devices
from .transport import assign


def sequential(problem: Problem, first: int = 0) -> Ints:
    """Cluster the experts of layer ``first`` by whom their tokens meet, then place layer after layer, outwards, each
    exactly as suits the one that is placed already. [layers, slots]."""
    device = np.zeros((problem.layers, problem.experts), np.int64)
    one_hot = np.zeros((problem.layers, problem.experts, problem.ranks))

    def place(layer: int, chosen: Ints) -> None:
        device[layer] = chosen
        one_hot[layer] = chosen[:, None] == np.arange(problem.ranks)

    place(first, _clusters(_likeness(problem, first), problem.per_rank))
    for layer in [*range(first + 1, problem.layers), *range(first - 1, -1, -1)]:
        place(layer, assign(pulls_of_layer(problem, one_hot, layer), problem.per_rank))
    return slots_of_devices(device)


def _likeness(problem: Problem, layer: int) -> Floats:
    """[experts, experts]: how much two experts of a layer have the same neighbours."""
    total = np.zeros((problem.experts, problem.experts))
    if layer > 0:
        total += problem.transitions[layer - 1].T @ problem.transitions[layer - 1]
    if layer + 1 < problem.layers:
        total += problem.transitions[layer] @ problem.transitions[layer].T
    np.fill_diagonal(total, 0.0)
    return total


def _clusters(likeness: Floats, size: int) -> Ints:
    """Equal clusters, grown one after the other from the expert with most left to win; [experts] cluster numbers."""
    experts = likeness.shape[0]
    cluster = np.full(experts, -1, np.int64)
    for number in range(experts // size):
        free = cluster < 0
        pull = np.where(free, (likeness * free).sum(axis=1), -1.0)
        total = np.zeros(experts)
        chosen = int(pull.argmax())
        for _ in range(size):
            cluster[chosen] = number
            total += likeness[chosen]
            chosen = int(np.where(cluster < 0, total, -1.0).argmax())
    return cluster


def reassign(problem: Problem, device: Ints, sweeps: int) -> Ints:
    """Place each layer exactly while all others stay, forth and back, until nothing changes. Looks at device hops
    alone; they never grow. ``device``: [layers, experts]."""
    device = device.copy()
    one_hot = (device[:, :, None] == np.arange(problem.ranks)).astype(np.float64)
    order = [*range(problem.layers), *range(problem.layers - 2, 0, -1)]
    for _ in range(sweeps):
        changed = False
        for layer in order:
            pull = pulls_of_layer(problem, one_hot, layer)
            chosen = assign(pull, problem.per_rank)
            rows = np.arange(problem.experts)
            if pull[rows, chosen].sum() > pull[rows, device[layer]].sum():
                device[layer], changed = chosen, True
                one_hot[layer] = chosen[:, None] == np.arange(problem.ranks)
        if not changed:
            break
    return device
