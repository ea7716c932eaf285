"""Context-coherent execution (ExFlow): tokens stay where their last experts were, and attention finds its context
there.

Each layer: keys and values of all tokens are gathered on all ranks, attention runs for the tokens that are here, and
one exchange takes each token to the rank of its expert, where it stays. With more than one expert a token, the rank
that serves most of them combines, and the others send it what theirs made: a second exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .exchange import Wire, route
from .experts import ParallelExperts
from .layout import majority


@dataclass(frozen=True)
class Logits:
    """``logits``: [sequences, length, vocabulary] of this rank's sequences."""

    logits: torch.Tensor


@dataclass
class _Rows:
    """Tokens that are on this rank: their numbers over all ranks, and their residual stream [tokens, width]."""

    token: torch.Tensor
    state: torch.Tensor


class CoherentForward:
    """The forward of transformers' MixtralForCausalLM and Qwen3MoeForCausalLM over rows of tokens. All ranks must have
    the same number of sequences of one length."""

    def __init__(self, model: Any, blocks: dict[str, ParallelExperts], wire: Wire) -> None:
        self.model, self.wire = model, wire
        self.names = {id(block): name for name, block in blocks.items()}

    def __call__(self, input_ids: torch.Tensor) -> Logits:
        model, rank = self.model.model, self.wire.rank
        sequences, length = input_ids.shape
        count = sequences * length
        embedded = model.embed_tokens(input_ids)
        token = rank * count + torch.arange(count, device=input_ids.device)
        position = torch.arange(length, device=input_ids.device)[None]
        cosine, sine = model.rotary_emb(embedded, position_ids=position)
        rows = _Rows(token, embedded.reshape(count, -1))
        for number, layer in enumerate(model.layers):
            angles = cosine[0, rows.token % length], sine[0, rows.token % length]
            rows.state = rows.state + self._attention(layer, rows, angles, length, number)
            if type(layer.mlp).__name__.endswith("SparseMoeBlock"):
                rows = self._experts(layer, rows)
            else:
                rows.state = rows.state + layer.mlp(layer.post_attention_layernorm(rows.state))
        home = route(self.wire, rows.token // count, "the way home")
        state, token = home.there(rows.state, rows.token)
        hidden = model.norm(state[torch.argsort(token)]).reshape(sequences, length, -1)
        return Logits(self.model.lm_head(hidden))

    def _attention(
        self, layer: Any, rows: _Rows, angles: tuple[torch.Tensor, torch.Tensor], length: int, number: int
    ) -> torch.Tensor:
        """[tokens, width] of the tokens here, over the keys and values of all."""
        attention = layer.self_attn
        state = layer.input_layernorm(rows.state)
        heads = (len(state), -1, attention.head_dim)
        query, key = attention.q_proj(state).view(heads), attention.k_proj(state).view(heads)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = (_rotate(each, *angles) for each in (query, key))
        value = attention.v_proj(state).view(heads)
        both, token = self._gather(torch.stack([key, value], dim=1), rows.token, number)
        order = torch.argsort(token)
        window = getattr(attention, "sliding_window", None) or getattr(attention.config, "sliding_window", None)
        made = _attend(query, rows.token, both[order], token[order], length, window, attention.scaling)
        return torch.as_tensor(attention.o_proj(made.reshape(len(state), -1)))

    def _gather(self, both: torch.Tensor, token: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of all ranks, on all ranks: every row goes to each."""
        ranks = self.wire.ranks
        row = torch.arange(len(token), device=token.device).repeat(ranks)
        everywhere = torch.arange(ranks, device=token.device).repeat_interleave(len(token))
        plan = route(self.wire, everywhere, f"gathering keys and values of layer {number}")
        everything, numbers = plan.there(both[row], token[row])
        return everything, numbers

    def _experts(self, layer: Any, rows: _Rows) -> _Rows:
        block: ParallelExperts = layer.mlp.experts
        name = self.names[id(block)]
        normed = layer.post_attention_layernorm(rows.state)
        _, weights, index = layer.mlp.gate(normed)
        block.weight_itemsize = weights.element_size()
        at = torch.full_like(rows.token, self.wire.rank)
        served = block.layout.destinations(index, at, rows.token)
        combine = served[:, 0] if index.shape[1] == 1 else majority(served, at, self.wire.ranks)
        going, row = block.copies(served)
        plan = route(self.wire, going, f"the exchange of {name}")
        mine = torch.where(served[row] == going[:, None], index[row], -1)
        header = torch.cat([rows.token[row, None], combine[row, None], mine], dim=1)
        came, state, weight = plan.there(header, rows.state[row], weights[row])
        token, combine, mine = came[:, 0], came[:, 1], came[:, 2:]
        made = block.compute(layer.post_attention_layernorm(state), mine, weight)
        here = combine == self.wire.rank
        if index.shape[1] == 1:
            return _Rows(token, state + made)
        partial = route(self.wire, combine, f"the combination of {name}")
        arrived, parts = partial.there(token, made)
        kept = token[here]
        order = torch.argsort(kept)
        place = order[torch.searchsorted(kept[order], arrived)]
        return _Rows(kept, state[here].index_add(0, place, parts))


def _rotate(rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [tokens, heads, width], as transformers' Llama-like models have it."""
    half = rows.shape[-1] // 2
    turned = torch.cat([-rows[..., half:], rows[..., :half]], dim=-1)
    return rows * cosine[:, None] + turned * sine[:, None]


def _attend(
    query: torch.Tensor, token: torch.Tensor, both: torch.Tensor, keys: torch.Tensor, length: int,
    window: int | None, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of rows [tokens, heads, width], each over its own sequence: ``both`` [all tokens, 2, key heads,
    width] in order of ``keys``, the tokens' numbers."""
    result = torch.zeros_like(query)
    for sequence in torch.unique(token // length).tolist():
        mine = (token // length == sequence).nonzero()[:, 0]
        theirs = both[keys // length == sequence]
        key, value = (theirs[:, i].transpose(0, 1)[None] for i in (0, 1))
        at, to = token[mine] % length, torch.arange(length, device=token.device)
        seen = to[None, :] <= at[:, None]
        if window is not None:
            seen &= to[None, :] > at[:, None] - window
        made = torch.nn.functional.scaled_dot_product_attention(
            query[mine].transpose(0, 1)[None], key, value, attn_mask=seen, scale=scaling, enable_gqa=True
        )
        result = result.index_copy(0, mine, made[0].transpose(0, 1))
    # without tokens too the keys are part of the graph, so that the backward's exchanges are the same on all ranks
    return result if len(token) else result + 0.0 * both.sum()
