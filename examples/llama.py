"""A Llama-like model small enough to train on a laptop's CPU (26 million parameters).

effcc plan examples/llama.py --train --optimizer adamw
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=24,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    use_cache=False,
)


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG)


def example_inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 512))
    return {"input_ids": tokens, "labels": tokens}


optimizer = "adamw"
