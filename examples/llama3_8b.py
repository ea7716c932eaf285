"""Llama-3-8B at sequence length 8192: will its training step fit? Planned, never run here.

effcc plan examples/llama3_8b.py --train --optimizer adamw --dtype bf16 --device h200
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    use_cache=False,
)
SEQUENCE = 8192


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG)


def example_inputs() -> dict[str, torch.Tensor]:
    tokens = torch.zeros(1, SEQUENCE, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}


optimizer = "adamw"
