"""A small Qwen3-MoE: 32 narrow experts a layer, 4 of them used by each token.

effcc plan examples/qwen3_moe.py --train
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

CONFIG = Qwen3MoeConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    num_experts=32,
    num_experts_per_tok=4,
    max_position_embeddings=512,
    use_cache=False,
)


def model() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(CONFIG)


def example_inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 256))
    return {"input_ids": tokens, "labels": tokens}


optimizer = "adamw"
