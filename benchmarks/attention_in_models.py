"""A training step of transformers' models with attention written out, cascades on and off beside Inductor.

python benchmarks/attention_in_models.py [--models gpt2,llama] [--rounds 9] [--length 2048]

``share``: the part of Inductor's step that attention takes, from a third model whose attention returns its values
untouched (no scores, no softmax, no second product). ``aim``: 1 - 0.6 * share, the step ratio to stay below. Lengths
are the longest that each model was published for, up to ``--length`` tokens, batch 1, float32.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from typing import Any

import effcc
import torch
from common import allocator_peak, environment, interleaved, keep, median_ratio, models, show, training_step

LAYERS, VOCABULARY = 4, 8192
Build = Callable[[int], models.Sample]


def no_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """What is left of an attention layer without its attention. query: [batch, heads, queries, width]; key and value:
    [batch, groups, keys, width]. Keys and queries keep their gradients, at the cost of a row each."""
    groups, queries = value.shape[1], query.shape[2]
    mixed = value.repeat_interleave(query.shape[1] // groups, dim=1)[:, :, :queries]
    rows = query[:, :, :1] + key[:, :, :1].repeat_interleave(query.shape[1] // groups, dim=1)
    return (mixed + rows[..., :1]).transpose(1, 2).contiguous(), None


def text(model: torch.nn.Module, length: int, **inputs: torch.Tensor) -> models.Sample:
    words = torch.randint(0, VOCABULARY, (1, length))
    return models.Sample(model, {"input_ids": words, **inputs}, torch.randint(0, VOCABULARY, (1, length)))


def gpt2(length: int) -> models.Sample:
    from transformers import GPT2Config, GPT2LMHeadModel

    length = min(length, 1024)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=length, n_embd=768, n_layer=LAYERS, n_head=12, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return text(GPT2LMHeadModel(config), length)


def decoder(kind: str, **more: Any) -> Build:
    """A decoder of the Llama family: heads of 64 in groups of two."""

    def build(length: int) -> models.Sample:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {
            "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": LAYERS,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": length,
            "use_cache": False, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
        }  # fmt: skip
        return text(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)), length)

    return build


def bert(length: int) -> models.Sample:
    from transformers import BertConfig, BertForMaskedLM

    length = min(length, 512)
    config = BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, length - length // 8 :] = 0
    return text(BertForMaskedLM(config), length, attention_mask=mask)


def vit(length: int) -> models.Sample:
    """384 pixels, patches of 16: 577 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=384, num_hidden_layers=LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = ViTForImageClassification(config)
    return models.Sample(model, {"pixel_values": torch.randn(1, 3, 384, 384)}, torch.randint(0, 2, (1,)))


def t5(length: int) -> models.Sample:
    from transformers import T5Config, T5ForConditionalGeneration

    length = min(length, 512)
    config = T5Config(
        vocab_size=VOCABULARY, num_layers=LAYERS, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0
    )
    words = torch.randint(0, VOCABULARY, (1, length))
    return text(T5ForConditionalGeneration(config), length, decoder_input_ids=words)


MODELS: dict[str, Build] = {
    "gpt2": gpt2,
    "llama": decoder("llama"),
    "mistral": decoder("mistral", sliding_window=256),
    "qwen3": decoder("qwen3"),
    "gemma2": decoder("gemma2", sliding_window=256, attention_dropout=0.0),
    "bert": bert,
    "vit": vit,
    "t5": t5,
}


def build(name: str, length: int, attention: str) -> models.Sample:
    torch.manual_seed(0)
    sample = MODELS[name](length)
    sample.model.set_attn_implementation(attention)
    return sample


def measure(name: str, length: int, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    effcc.reset_reports()
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "on": ("eager", {"backend": "effcc"}),
        "off": ("eager", {"backend": "effcc", "options": {"cascades": False}}),
        "inductor": ("eager", {"backend": "inductor"}),
        "none": ("none", {"backend": "inductor"}),
    }
    samples = {kind: build(name, length, attention) for kind, (attention, _) in kinds.items()}
    steps, losses = {}, {}
    for kind, (_, how) in kinds.items():
        run = torch.compile(samples[kind].model, **how)
        steps[kind] = lambda run=run, sample=samples[kind]: training_step(run, sample)
        losses[kind] = float(steps[kind]())
        if kind == "on":
            fused = sum(len(report.cascades) for report in effcc.reports())
    seconds = interleaved(steps, rounds, settle=1)
    share = 1 - median_ratio(seconds["none"], seconds["inductor"])
    peaks = {kind: allocator_peak(steps[kind], samples[kind].model) for kind in ("on", "off", "inductor")}
    return {
        "model": name,
        "fused": fused,
        **{f"{kind} ms": statistics.median(seconds[kind]) * 1e3 for kind in kinds},
        "share": share,
        "ratio": median_ratio(seconds["on"], seconds["inductor"]),
        "aim": 1 - 0.6 * share,
        **{f"{kind} MB": peak / 1e6 for kind, peak in peaks.items()},
        "loss difference": abs(losses["on"] - losses["inductor"]),
    }


def main() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--name", default="attention_in_models")
    arguments = parser.parse_args()
    AttentionInterface.register("none", no_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("none", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    about = environment() | {"length": arguments.length, "layers": LAYERS}
    rows = []
    for name in arguments.models.split(","):
        rows.append(measure(name, arguments.length, arguments.rounds))
        show("training step", rows[-1:])
        gc.collect()
    show("training step", rows)
    print(keep(arguments.name, rows, about))


if __name__ == "__main__":
    main()
