"""Where each expert's copies are, and to which of them a token goes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import ExpertParallelError


@dataclass(frozen=True)
class LayerLayout:
    """One MoE layer. ``slots``: [ranks][slots per rank] experts; ``copies``: [experts]; ``ranks``: [experts, most
    copies] the ranks that hold an expert (each once), repeated to fill the row; ``here``: [experts, ranks] whether
    one holds it.
    """

    slots: tuple[tuple[int, ...], ...]
    copies: torch.Tensor
    ranks: torch.Tensor
    here: torch.Tensor

    def destinations(self, choices: torch.Tensor, at: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """[tokens, k] the rank that serves each choice: the one where the token is, if it holds the expert, else the
        copies in turn.

        Args:
            choices: [tokens, k] experts. ``at``: [tokens] ranks. ``token``: [tokens] numbers over all ranks.
        """
        turn = token[:, None] % self.copies[choices]
        elsewhere = self.ranks[choices, turn]
        return torch.where(self.here[choices, at[:, None]], at[:, None], elsewhere)


def majority(destinations: torch.Tensor, at: torch.Tensor, ranks: int) -> torch.Tensor:
    """[tokens] the rank that serves most of a token's choices: of equals the one where the token is, else the first."""
    votes = torch.nn.functional.one_hot(destinations, ranks).sum(dim=1) * 2
    votes.scatter_add_(1, at[:, None], torch.ones_like(at)[:, None])
    # the token's own rank breaks ties, but wins nothing by itself
    votes = torch.where(votes > 1, votes, torch.zeros_like(votes))
    return votes.argmax(dim=1)


def layouts(slots: Sequence[Sequence[int]], ranks: int, experts: int) -> list[LayerLayout]:
    """The layouts of all layers.

    Args:
        slots: [layers][slots] experts in device order, as ``effcc place-experts`` gives them.

    Raises:
        ExpertParallelError: slots do not divide among the ranks, or a layer misses an expert or names one too many.
    """
    found = []
    for number, row in enumerate(slots):
        where = f"layer {number} of the placement"
        if len(row) % ranks:
            raise ExpertParallelError(
                f"{len(row)} slots do not divide among {ranks} ranks", where=where,
                remedy=f"place anew: effcc place-experts --ranks {ranks} --slots N, N a multiple of {ranks}",
            )  # fmt: skip
        if set(row) != set(range(experts)):
            missing = sorted(set(range(experts)) - set(row)) or sorted(set(row) - set(range(experts)))
            raise ExpertParallelError(
                f"the layer has {experts} experts; the placement misses or invents {missing[:8]}", where=where,
                remedy="give a placement of this model",
            )  # fmt: skip
        room = len(row) // ranks
        by_rank = tuple(tuple(row[rank * room : (rank + 1) * room]) for rank in range(ranks))
        holders = [[rank for rank in range(ranks) if expert in by_rank[rank]] for expert in range(experts)]
        most = max(map(len, holders))
        here = torch.zeros(experts, ranks, dtype=torch.bool)
        for expert, on in enumerate(holders):
            here[expert, on] = True
        found.append(
            LayerLayout(
                by_rank,
                torch.tensor([len(on) for on in holders]),
                torch.tensor([(on * most)[:most] for on in holders]),
                here,
            )
        )
    return found


def digest(slots: Sequence[Sequence[int]], *more: object) -> bytes:
    """32 bytes that differ where placements (or anything else that must be equal on all ranks) do."""
    return hashlib.sha256(repr(([list(map(int, row)) for row in slots], more)).encode()).digest()
