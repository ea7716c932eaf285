"""GPT-2 trained with ``torch.compile(backend="effcc")``; also a model file.

python examples/gpt2_train.py --steps 20          train on synthetic text and print the loss
effcc plan examples/gpt2_train.py --train         plan the same training step without allocating it
effcc plan examples/gpt2_train.py:small --train   a 4-layer GPT-2
"""

import argparse
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

BATCH, SEQUENCE = 2, 256
FULL = GPT2Config(use_cache=False)
SMALL = GPT2Config(vocab_size=512, n_layer=4, n_embd=128, n_head=4, use_cache=False)


def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(FULL)


def small() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(SMALL)


def batch(config: GPT2Config, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    """Token sequences that can be learned: each counts up from a random start."""
    start = torch.randint(0, config.vocab_size, (BATCH, 1), generator=generator)
    tokens = (start + torch.arange(SEQUENCE)) % config.vocab_size
    return {"input_ids": tokens, "labels": tokens}


def example_inputs() -> dict[str, torch.Tensor]:
    return batch(FULL)


def small_inputs() -> dict[str, torch.Tensor]:
    return batch(SMALL)


def optimizer(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-4)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Train GPT-2 on synthetic text.")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--full", action="store_true", help="GPT-2 with 124 million parameters")
    arguments.add_argument("--backend", default="effcc")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = arguments.parse_args()

    torch.manual_seed(0)
    network = (model() if chosen.full else small()).to(chosen.device).train()
    update = optimizer(network.parameters())
    compiled = torch.compile(network, backend=chosen.backend)
    generator = torch.Generator().manual_seed(1)
    for number in range(chosen.steps):
        begin = time.perf_counter()
        inputs = {name: value.to(chosen.device) for name, value in batch(network.config, generator).items()}
        loss = compiled(**inputs).loss
        loss.backward()
        update.step()
        update.zero_grad()
        print(f"step {number:3d}  loss {loss.item():.4f}  {time.perf_counter() - begin:.3f} s", flush=True)


if __name__ == "__main__":
    main()
