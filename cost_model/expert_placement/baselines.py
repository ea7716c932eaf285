"""Placements that others make: round robin, and the greedy of DeepSeek's expert-parallel load balancer (EPLB,
github.com/deepseek-ai/EPLB), hierarchical and global. They look at loads alone."""

from __future__ import annotations

import numpy as np

from .problem import Floats, Ints, Problem


def round_robin(problem: Problem) -> Ints:
    """Expert e on device e mod ranks; further slots repeat the experts from the first on. [layers, slots]."""
    number = np.arange(problem.slots).reshape(problem.per_rank, problem.ranks).T.ravel() % problem.experts
    return np.tile(number, (problem.layers, 1)).astype(np.int64)


def eplb_global(problem: Problem) -> Ints:
    """EPLB's global policy: replicate the most loaded, pack the copies, whatever node they fall on."""
    layers = [_hierarchical(load, problem.slots, 1, 1, problem.ranks) for load in problem.loads]
    return np.stack(layers)


def eplb_hierarchical(problem: Problem) -> Ints:
    """EPLB's hierarchical policy: pack groups to nodes, replicate within nodes, pack copies to devices."""
    layers = [
        _hierarchical(load, problem.slots, problem.groups, problem.nodes, problem.ranks) for load in problem.loads
    ]
    return np.stack(layers)


def _hierarchical(load: Floats, slots: int, groups: int, nodes: int, ranks: int) -> Ints:
    size, experts = load.size // groups, load.size
    node_of_group, place = balanced_packing(load.reshape(groups, size).sum(axis=1), nodes)
    # experts in the order of the nodes that their groups lie on
    start = (node_of_group * (groups // nodes) + place) * size
    position = (start[:, None] + np.arange(size)).ravel()
    by_node = np.empty(experts, np.int64)
    by_node[position] = np.arange(experts)
    here, room = experts // nodes, slots // nodes
    placed = []
    for members in by_node.reshape(nodes, here):
        which, copies = replicate(load[members], room)
        device, rank_in_device = balanced_packing((load[members] / copies)[which], ranks // nodes)
        slot = np.empty(room, np.int64)
        slot[device * (slots // ranks) + rank_in_device] = members[which]
        placed.append(slot)
    return np.concatenate(placed)


def balanced_packing(weight: Floats, packs: int) -> tuple[Ints, Ints]:
    """Items in order of weight to the lightest pack that has room; each gets as many. Returns (pack, place in it)."""
    room = weight.size // packs
    pack, place = np.zeros(weight.size, np.int64), np.zeros(weight.size, np.int64)
    if room == 1:
        return np.arange(weight.size, dtype=np.int64), place
    total, number = [0.0] * packs, [0] * packs
    for item in np.argsort(-weight, kind="stable").tolist():
        chosen = min((p for p in range(packs) if number[p] < room), key=total.__getitem__)
        pack[item], place[item] = chosen, number[chosen]
        total[chosen] += float(weight[item])
        number[chosen] += 1
    return pack, place


def replicate(load: Floats, slots: int) -> tuple[Ints, Ints]:
    """One more copy for the expert with the largest load per copy, until all slots are taken.

    Returns:
        The expert in each slot, and the copies of each expert.
    """
    which = list(range(load.size))
    copies = np.ones(load.size, np.int64)
    for _ in range(slots - load.size):
        most = int(np.argmax(load / copies))
        which.append(most)
        copies[most] += 1
    return np.array(which, np.int64), copies
