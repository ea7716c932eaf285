"""Paths through the sets of experts that one device may hold, layer after layer. Compiled."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .problem import Floats, Ints


@compiled
def best_prefixes(gains: Floats, price: Floats, out: Floats, came: Ints) -> None:
    """``gains``: [layers - 1, sets, sets] tokens kept between two sets; ``price``: [layers, sets] what a set costs
    (infinite: it is not allowed). Fills ``out`` [layers, sets], the best value of a path that ends at a set, and
    ``came``, the set before."""
    layers, sets = price.shape
    for s in range(sets):
        out[0, s] = -price[0, s]
        came[0, s] = -1
    for layer in range(1, layers):
        for s in range(sets):
            out[layer, s] = -np.inf
            came[layer, s] = -1
        for before in range(sets):
            value = out[layer - 1, before]
            if value == -np.inf:
                continue
            for s in range(sets):
                candidate = value + gains[layer - 1, before, s]
                if candidate > out[layer, s]:
                    out[layer, s] = candidate
                    came[layer, s] = before
        for s in range(sets):
            out[layer, s] -= price[layer, s]


@compiled
def best_suffixes(gains: Floats, price: Floats, out: Floats) -> None:
    """Fills ``out`` [layers, sets]: the best value of what follows a set, its own price not counted."""
    layers, sets = price.shape
    for s in range(sets):
        out[layers - 1, s] = 0.0
    for layer in range(layers - 2, -1, -1):
        for s in range(sets):
            value = -np.inf
            for after in range(sets):
                candidate = gains[layer, s, after] - price[layer + 1, after] + out[layer + 1, after]
                if candidate > value:
                    value = candidate
            out[layer, s] = value


@compiled
def enumerate_paths(gains: Floats, price: Floats, suffix: Floats, least: float, most: int) -> Ints:
    """All paths worth at least ``least``, [paths, layers]; an empty [0, 0] where there are more than ``most``."""
    layers, sets = price.shape
    known = np.empty((most, layers), np.int64)
    value = np.empty(most)
    number = 0
    for s in range(sets):
        if -price[0, s] + suffix[0, s] >= least:
            if number >= most:
                return np.empty((0, 0), np.int64)
            known[number, 0] = s
            value[number] = -price[0, s]
            number += 1
    for layer in range(1, layers):
        longer = np.empty((most, layers), np.int64)
        longer_value = np.empty(most)
        found = 0
        for index in range(number):
            before = known[index, layer - 1]
            for s in range(sets):
                candidate = value[index] + gains[layer - 1, before, s] - price[layer, s]
                if candidate + suffix[layer, s] >= least:
                    if found >= most:
                        return np.empty((0, 0), np.int64)
                    for earlier in range(layer):
                        longer[found, earlier] = known[index, earlier]
                    longer[found, layer] = s
                    longer_value[found] = candidate
                    found += 1
        known, value, number = longer, longer_value, found
    return known[:number].copy()
