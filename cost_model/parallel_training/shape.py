"""The shape of a transformer, and what follows from it alone: parameters and model FLOP.

Counts are those of Korthikanti et al. (Reducing activation recomputation in large transformer models, 2022),
written for any number of key/value heads, gated feed-forward layers and experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...errors import OptionError


@dataclass(frozen=True)
class TransformerShape:
    """A decoder or encoder of equal layers.

    ``sequence`` tokens a sample; ``feed_forward`` is one expert's width where there are experts,
    ``shared_feed_forward`` that of the part that every token passes beside them. ``positions``: learned ones, 0 for
    rotary ones (``rotary``: queries and keys are turned in a kernel of their own) or none. ``causal`` attention may
    skip masked tiles where a fused kernel runs it. ``tied``: input and output embedding are one.
    """

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    vocabulary: int
    sequence: int
    kv_heads: int = 0
    head_size: int = 0
    gated: bool = False
    tied: bool = False
    biases: bool = True
    dropout: bool = False
    positions: int = 0
    experts: int = 0
    experts_per_token: int = 0
    shared_feed_forward: int = 0
    causal: bool = True
    rotary: bool = False

    def __post_init__(self) -> None:
        """Raises OptionError for sizes that are no transformer's."""
        for name in ("layers", "hidden", "heads", "feed_forward", "vocabulary", "sequence"):
            if getattr(self, name) < 1:
                raise OptionError(f"a transformer's {name} is {getattr(self, name)}", remedy="give a positive number")
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if not self.head_size:
            object.__setattr__(self, "head_size", self.hidden // self.heads)
        if self.heads % self.kv_heads:
            raise OptionError(f"{self.heads} heads do not share {self.kv_heads} key/value heads evenly")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise OptionError(f"{self.experts_per_token} of {self.experts} experts for each token is not possible")

    @property
    def attention_width(self) -> int:
        """Elements of all heads of a token."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def matrices(self) -> int:
        """Weights of a feed-forward layer."""
        return 3 if self.gated else 2

    @property
    def attention_parameters(self) -> int:
        """Of a layer's attention, with its norm."""
        weights = self.hidden * (2 * self.attention_width + 2 * self.kv_width)
        biases = self.attention_width + 2 * self.kv_width + self.hidden if self.biases else 0
        return weights + biases + self.norm_parameters

    @property
    def norm_parameters(self) -> int:
        return self.hidden * (2 if self.biases else 1)

    @property
    def expert_parameters(self) -> int:
        """Of one expert, or of the only feed-forward layer."""
        return self._feed_forward_parameters(self.feed_forward)

    def _feed_forward_parameters(self, width: int) -> int:
        biases = (self.matrices - 1) * width + self.hidden if self.biases else 0
        return self.matrices * self.hidden * width + biases

    @property
    def dense_layer_parameters(self) -> int:
        """Of a layer without its routed experts."""
        shared = self._feed_forward_parameters(self.shared_feed_forward) if self.shared_feed_forward else 0
        router = self.hidden * self.experts
        own = 0 if self.experts else self.expert_parameters
        return self.attention_parameters + self.norm_parameters + router + shared + own

    @property
    def layer_parameters(self) -> int:
        return self.dense_layer_parameters + self.experts * self.expert_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of the input: words and learned positions."""
        return (self.vocabulary + self.positions) * self.hidden

    @property
    def parameters(self) -> int:
        head = 0 if self.tied else self.vocabulary * self.hidden
        return self.layers * self.layer_parameters + self.embedding_parameters + head + self.norm_parameters

    @property
    def layer_flop(self) -> float:
        """Matrix products of one layer's forward for one token: what the model needs, causal attention in full as MFU
        is counted by custom."""
        products = self.hidden * (2 * self.attention_width + 2 * self.kv_width) + self.hidden * self.experts
        routed = self.experts_per_token if self.experts else 1
        products += self.matrices * self.hidden * (routed * self.feed_forward + self.shared_feed_forward)
        return 2.0 * products + 4.0 * self.sequence * self.attention_width

    @property
    def head_flop(self) -> float:
        """Of the output layer's forward for one token."""
        return 2.0 * self.hidden * self.vocabulary

    def model_flop(self, samples: int) -> float:
        """Of a training step (backward twice the forward, nothing recomputed)."""
        return 3.0 * samples * self.sequence * (self.layers * self.layer_flop + self.head_flop)


#: What configurations of models call the sizes; the first name that is there counts.
_NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads", "num_kv_heads"),
    "head_size": ("head_dim",),
    "feed_forward": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "vocabulary": ("vocab_size",),
    "sequence": ("max_position_embeddings", "n_positions", "max_seq_len", "max_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_top_k", "top_k"),
}


def shape_from_config(config: Mapping[str, Any], sequence: int | None = None) -> TransformerShape:
    """The shape that a configuration describes (a transformers ``config.to_dict()``, or the fields of
    ``TransformerShape``). What a configuration does not say (gated layers, biases) is taken from the kind of its
    activation and norm. ``sequence``: tokens of a sample, its longest if not given.

    Raises OptionError naming the first size that is missing.
    """
    found: dict[str, Any] = {}
    for name, aliases in _NAMES.items():
        value = next((config[each] for each in (name, *aliases) if config.get(each) is not None), None)
        if value is not None:
            found[name] = int(value)
    if sequence is not None:
        found["sequence"] = sequence
    if "hidden" in found:
        found.setdefault("feed_forward", 4 * found["hidden"])
    if found.get("experts", 0) > 1:
        found["feed_forward"] = int(config.get("moe_intermediate_size") or found["feed_forward"])
        found.setdefault("experts_per_token", 1)
        shared = config.get("shared_expert_intermediate_size")
        if shared is None:
            shared = int(config.get("n_shared_experts") or 0) * found["feed_forward"]
        found["shared_feed_forward"] = int(shared)
    else:
        found.pop("experts", None)
        found.pop("experts_per_token", None)
    for name in ("layers", "hidden", "heads", "vocabulary", "sequence"):
        if name not in found:
            raise OptionError(
                f"the configuration does not say the transformer's {name}",
                remedy=f"one of {', '.join((name, *_NAMES[name]))}",
            )
    activation = str(config.get("hidden_act") or config.get("activation_function") or "gelu")
    root_mean_square = "rms_norm_eps" in config
    found["gated"] = root_mean_square or "glu" in activation
    found["biases"] = bool(config.get("attention_bias", False)) or not root_mean_square
    found["tied"] = bool(config.get("tie_word_embeddings", False))
    found["dropout"] = any(bool(config.get(name)) for name in ("attn_pdrop", "resid_pdrop", "attention_dropout"))
    found["rotary"] = root_mean_square or "rope_theta" in config or bool(config.get("rope_parameters"))
    if not found["rotary"]:
        found["positions"] = found["sequence"]
    given = {each.name for each in fields(TransformerShape)} & set(config)
    return TransformerShape(**{**found, **{name: config[name] for name in given if config[name] is not None}})
