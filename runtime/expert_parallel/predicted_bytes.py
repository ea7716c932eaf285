"""Bytes that a forward sends between ranks, predicted from what was routed where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .layout import LayerLayout, majority

#: Of one integer that travels with a row: a token's number, an expert, a count.
INTEGER = 8


@dataclass(frozen=True)
class ModelSizes:
    """Width of a hidden state, of keys and values together; bytes of one number of them, and of a routing weight."""

    width: int
    keys_and_values: int
    itemsize: int
    weight: int

    @staticmethod
    def of(model: torch.nn.Module, weight: int = 4) -> ModelSizes:
        config: Any = model.config
        heads = int(config.num_attention_heads)
        head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        pairs = int(getattr(config, "num_key_value_heads", None) or heads)
        return ModelSizes(int(config.hidden_size), 2 * pairs * head, next(model.parameters()).element_size(), weight)


def predict_bytes(
    choices: torch.Tensor, homes: torch.Tensor, layers: Sequence[LayerLayout], ranks: int, sizes: ModelSizes, mode: str
) -> int:
    """Bytes that all ranks together send to others in one forward.

    Args:
        choices: [tokens, layers, k] experts, tokens in order of their ranks. ``homes``: [tokens] their ranks.
        mode: ``home`` or ``coherent``, see ExpertParallel.
    """
    k = choices.shape[2]
    counts = ranks * (ranks - 1) * INTEGER  # each exchange is agreed first
    number = _number_on_rank(homes, ranks)
    at, total = homes, 0
    for index, layout in enumerate(layers):
        if mode == "home":
            served = layout.destinations(choices[:, index], homes, number)
            away = _ranks_served(served, homes, ranks)
            total += counts + away * (2 * sizes.width * sizes.itemsize + k * (sizes.weight + INTEGER))
            continue
        # everyone gets everyone's keys and values
        total += counts + len(homes) * (ranks - 1) * (sizes.keys_and_values * sizes.itemsize + INTEGER)
        served = layout.destinations(choices[:, index], at, torch.arange(len(at)))
        combined = served[:, 0] if k == 1 else majority(served, at, ranks)
        there = _ranks_served(served, at, ranks)
        total += counts + there * (sizes.width * sizes.itemsize + k * (sizes.weight + INTEGER) + 2 * INTEGER)
        if k > 1:
            total += counts + _ranks_served(served, combined, ranks) * (sizes.width * sizes.itemsize + INTEGER)
        at = combined
    if mode == "coherent":
        total += counts + int((at != homes).sum()) * (sizes.width * sizes.itemsize + INTEGER)
    return total


def _ranks_served(served: torch.Tensor, at: torch.Tensor, ranks: int) -> int:
    """(token, rank) pairs in which another rank than ``at`` serves a token."""
    wanted = torch.zeros(len(served), ranks, dtype=torch.bool)
    wanted.scatter_(1, served, True)
    wanted.scatter_(1, at[:, None], False)
    return int(wanted.sum())


def _number_on_rank(homes: torch.Tensor, ranks: int) -> torch.Tensor:
    """[tokens] the number of each token among those of its rank."""
    number = torch.zeros_like(homes)
    for rank in range(ranks):
        mine = homes == rank
        number[mine] = torch.arange(int(mine.sum()))
    return number
