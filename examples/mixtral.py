"""A small Mixtral: every layer routes each token to 2 of 8 experts.

effcc plan examples/mixtral.py --train
"""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

CONFIG = MixtralConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    use_cache=False,
)


def model() -> MixtralForCausalLM:
    return MixtralForCausalLM(CONFIG)


def example_inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 256))
    return {"input_ids": tokens, "labels": tokens}


optimizer = "adamw"
