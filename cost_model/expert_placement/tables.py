"""A placement without replicas as the arrays that compiled searches read and change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problem import Floats, Ints, Problem


@dataclass
class Tables:
    """``slots``: [layers, slots] experts in device order. ``pull``: [layers, experts, ranks] what of the objective
    (hops kept, migration saved) an expert wins on a device while all other layers stay as they are. ``load``:
    [layers, ranks].

    Within a layer experts do not meet, so swapping two of them changes the objective by their pulls alone.
    """

    problem: Problem
    slots: Ints
    pull: Floats
    load: Floats

    @property
    def device(self) -> Ints:
        """[layers, experts]."""
        return device_of_expert(self.problem, self.slots)


def device_of_expert(problem: Problem, slots: Ints) -> Ints:
    """[layers, experts] for a placement without replicas."""
    device = np.empty(slots.shape, np.int64)
    np.put_along_axis(device, slots, np.broadcast_to(problem.device_of_slot, slots.shape), axis=1)
    return device


def slots_of_devices(device: Ints) -> Ints:
    """The inverse of ``device_of_expert``."""
    return np.argsort(device, axis=1, kind="stable").astype(np.int64)


def tables(problem: Problem, slots: Ints) -> Tables:
    """The tables of a placement, which they copy."""
    slots = np.ascontiguousarray(slots, np.int64).copy()
    device = device_of_expert(problem, slots)
    load = np.zeros((problem.layers, problem.ranks))
    for layer in range(problem.layers):
        load[layer] = np.bincount(device[layer], problem.loads[layer], problem.ranks)
    return Tables(problem, slots, pulls(problem, device), load)


def pulls(problem: Problem, device: Ints) -> Floats:
    """[layers, experts, ranks], see Tables."""
    one_hot = (device[:, :, None] == np.arange(problem.ranks)).astype(np.float64)
    per_hop, per_node_hop = problem.weight_of_hops
    pull = np.zeros((problem.layers, problem.experts, problem.ranks))
    for layer in range(problem.layers):
        pull[layer] = pulls_of_layer(problem, one_hot, layer)
    if per_node_hop:
        within = pull.reshape(*pull.shape[:2], problem.nodes, problem.ranks_per_node).sum(axis=3)
        pull = per_hop * pull + per_node_hop * np.repeat(within, problem.ranks_per_node, axis=2)
    else:
        pull *= per_hop
    if problem.current_held is not None and problem.weights.migration:
        pull += problem.weights.migration * problem.current_held.transpose(0, 2, 1)
    return np.ascontiguousarray(pull)


def pulls_of_layer(problem: Problem, one_hot: Floats, layer: int) -> Floats:
    """[experts, ranks] tokens that an expert shares with those of the layers before and after on each device."""
    pull = np.zeros((problem.experts, problem.ranks))
    if layer > 0:
        pull += problem.transitions[layer - 1].T @ one_hot[layer - 1]
    if layer + 1 < problem.layers:
        pull += problem.transitions[layer] @ one_hot[layer + 1]
    return pull
