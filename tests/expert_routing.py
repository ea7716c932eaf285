"""Generators of expert routing with a known affinity, for tests and benchmarks: numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def planted(generator: np.random.Generator, experts: int, layers: int, groups: int, affinity: float, skew: float = 0.3):
    """A Markov chain with planted groups: from an expert of group g a token goes to an expert of group g of the next
    layer with probability ``affinity``, else to any; within, experts are drawn by their popularity (log-normal with
    deviation ``skew``). Experts are numbered at random in each layer.

    Returns (first [experts], steps [layers - 1, experts, experts], group [layers, experts]).
    """
    group = np.stack([generator.permutation(np.arange(experts) % groups) for _ in range(layers)])
    popular = np.exp(skew * generator.standard_normal((layers, experts)))
    first = popular[0] / popular[0].sum()
    steps = np.zeros((layers - 1, experts, experts))
    for layer in range(layers - 1):
        same = (group[layer][:, None] == group[layer + 1][None, :]) * popular[layer + 1]
        anywhere = popular[layer + 1] / popular[layer + 1].sum()
        steps[layer] = affinity * same / same.sum(axis=1, keepdims=True) + (1 - affinity) * anywhere
    return first, steps, group


def preferred(generator: np.random.Generator, experts: int, layers: int, concentration: float):
    """A Markov chain without groups: each expert's successors are drawn from a Dirichlet distribution."""
    first = generator.dirichlet(np.full(experts, 2.0))
    steps = generator.dirichlet(np.full(experts, concentration), (layers - 1, experts))
    return first, steps


def walk(generator: np.random.Generator, first: Floats, steps: Floats, tokens: int, k: int = 1) -> Ints:
    """[tokens, layers, k] experts: each token's first choice is a path of the chain, the others come from the same
    distribution without repetition."""
    layers, experts = steps.shape[0] + 1, first.size
    chosen = np.zeros((tokens, layers, k), np.int64)
    weight = np.broadcast_to(first, (tokens, experts))
    for layer in range(layers):
        # the k largest of weight / exponential are a draw of k without repetition
        noise = generator.exponential(size=(tokens, experts))
        score = np.divide(weight, noise)
        top = np.argpartition(-score, k - 1, axis=1)[:, :k] if k < experts else np.tile(np.arange(experts), (tokens, 1))
        order = np.take_along_axis(score, top, axis=1).argsort(axis=1)[:, ::-1]
        chosen[:, layer] = np.take_along_axis(top, order, axis=1)
        if layer + 1 < layers:
            weight = steps[layer][chosen[:, layer, 0]]
    return chosen
