"""The experts of one MoE layer on the ranks that hold them: a stand-in for the layer's own ``experts`` module."""

from __future__ import annotations

import copy

import torch

from .exchange import Route, Wire, route
from .layout import LayerLayout


def local_experts(experts: torch.nn.Module, count: int, chosen: list[int]) -> torch.nn.Module:
    """A copy of a module of ``count`` experts with only those chosen, in this order: every parameter and buffer whose
    first dimension is the experts keeps these rows. transformers' experts are such modules."""
    local = copy.copy(experts)
    rows = torch.tensor(chosen)
    local._parameters, local._buffers, local._modules = {}, dict(experts._buffers), dict(experts._modules)
    for name, value in experts._parameters.items():
        if value is not None and value.shape[:1] == (count,):
            kept = value.detach()[rows.to(value.device)].clone()
            local._parameters[name] = torch.nn.Parameter(kept, requires_grad=value.requires_grad)
        else:
            local._parameters[name] = value
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if hasattr(local, key):
            setattr(local, key, len(chosen))
    return local


class ParallelExperts(torch.nn.Module):
    """Called as transformers' experts are: (hidden states [tokens, width], experts [tokens, k], weights [tokens, k]).

    A token goes once to each rank that holds one of its experts, and what they make of it comes back: two exchanges.
    Replicas of an expert begin equal; ``ExpertParallel.reduce_gradients`` keeps them so.
    """

    def __init__(self, experts: torch.nn.Module, layout: LayerLayout, wire: Wire, name: str) -> None:
        super().__init__()
        self.layout, self.wire, self.name = layout, wire, name
        #: A rank holds an expert once, whatever its number of slots there.
        self.held = tuple(dict.fromkeys(layout.slots[wire.rank]))
        self.experts = local_experts(experts, len(layout.copies), list(self.held))
        #: [experts] the place of each among those held, -1 for the others.
        self.place = torch.full((len(layout.copies),), -1)
        self.place[list(self.held)] = torch.arange(len(self.held))
        #: Of the last forward: [tokens, k] experts chosen here, and bytes of one routing weight.
        self.choices: torch.Tensor | None = None
        self.weight_itemsize = 4

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        tokens = hidden_states.shape[0]
        self.choices, self.weight_itemsize = top_k_index.detach(), top_k_weights.element_size()
        at = torch.full((tokens,), self.wire.rank, device=top_k_index.device)
        destinations = self.layout.destinations(top_k_index, at, torch.arange(tokens, device=at.device))
        going, row = self.copies(destinations)
        sent = route(self.wire, going, f"the dispatch of {self.name}")
        made = self.serve(
            sent, hidden_states[row], top_k_index[row], top_k_weights[row], destinations[row] == going[:, None]
        )
        returned = sent.back(made)
        return torch.zeros_like(hidden_states).index_add(0, row, returned)

    def copies(self, destinations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rank, token) for each rank that serves a token, once."""
        wanted = torch.zeros(len(destinations), self.wire.ranks, dtype=torch.bool, device=destinations.device)
        wanted.scatter_(1, destinations, True)
        row, rank = wanted.nonzero(as_tuple=True)
        return rank, row

    def serve(
        self, sent: Route, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, mine: torch.Tensor
    ) -> torch.Tensor:
        """Send rows to where their experts are; the weighted sum of what the experts here make of the rows that come.

        ``mine``: [rows, k] which of a row's choices the rank that it goes to serves.
        """
        came, came_weights, came_index = sent.there(hidden, weights, torch.where(mine, index, -1))
        return self.compute(came, came_index, came_weights)

    def compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum over the choices that are served here, [rows, k] experts, -1 for those that are not."""
        row, slot = (index >= 0).nonzero(as_tuple=True)
        if row.numel() == 0:
            # part of the graph, so that the backward's exchanges are the same on all ranks
            return hidden * 0.0 + 0.0 * weights.sum()
        local = self.place.to(index.device)[index[row, slot]]
        made = self.experts(hidden[row], local[:, None], weights[row, slot][:, None])
        return torch.zeros_like(hidden).index_add(0, row, made.to(hidden.dtype))
