"""The zoo: real architectures, built from their configuration with random weights, in a tiny and a benchmark size.

``build(name, size)`` gives a Sample in float32. ``loss_of`` turns whatever a model returns into a scalar; it stays in
the model's dtype (the losses of transformers cast logits to float32 first).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Sample:
    """A model with inputs for one step. ``target``: token ids [batch, length] or classes [batch]."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    target: torch.Tensor


@dataclass(frozen=True)
class Entry:
    """``casts``: the model computes parts in float32 whatever its parameters are. ``layer``: the class it repeats."""

    build: Callable[[str], Sample]
    casts: bool = False
    layer: Callable[[], type[nn.Module]] | None = None


def main_output(outputs: Any) -> torch.Tensor:
    if isinstance(outputs, torch.Tensor):
        return outputs
    for name in ("logits", "last_hidden_state"):
        if getattr(outputs, name, None) is not None:
            return getattr(outputs, name)  # type: ignore[no-any-return]
    raise TypeError(f"no tensor to take a loss of in {type(outputs).__name__}")


def loss_of(outputs: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the main output, [batch, ..., classes], against ``target``, [batch, ...]."""
    logits = main_output(outputs)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def token_ids(vocabulary: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape)


def text_sample(model: nn.Module, vocabulary: int, batch: int, length: int) -> Sample:
    return Sample(model, {"input_ids": token_ids(vocabulary, batch, length)}, token_ids(vocabulary, batch, length))


def gpt2(size: str) -> Sample:
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads, vocabulary, batch, length = (
        (2, 32, 4, 97, 2, 16) if size == "tiny" else (6, 384, 6, 8192, 2, 256)
    )
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return text_sample(GPT2LMHeadModel(config), vocabulary, batch, length)


def decoder_config(config: type, size: str, **more: Any) -> tuple[Any, tuple[int, int, int]]:
    """Configuration of a Llama-like decoder, and (vocabulary, batch, length)."""
    layers, width, heads, vocabulary, batch, length = (
        (2, 32, 4, 97, 2, 16) if size == "tiny" else (6, 256, 8, 4096, 2, 256)
    )
    made = config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width + width // 2, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=4 * length,
        use_cache=False, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=None, **more,
    )  # fmt: skip
    return made, (vocabulary, batch, length)


def llama(size: str) -> Sample:
    from transformers import LlamaConfig, LlamaForCausalLM

    config, sizes = decoder_config(LlamaConfig, size)
    return text_sample(LlamaForCausalLM(config), *sizes)


def mixtral(size: str) -> Sample:
    from transformers import MixtralConfig, MixtralForCausalLM

    config, sizes = decoder_config(MixtralConfig, size, num_local_experts=4, num_experts_per_tok=2)
    return text_sample(MixtralForCausalLM(config), *sizes)


def qwen3_moe(size: str) -> Sample:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    width = 16 if size == "tiny" else 128
    head = 8 if size == "tiny" else 32
    config, sizes = decoder_config(
        Qwen3MoeConfig, size, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=width, head_dim=head
    )
    return text_sample(Qwen3MoeForCausalLM(config), *sizes)


def bert(size: str) -> Sample:
    from transformers import BertConfig, BertForMaskedLM

    layers, width, heads, vocabulary, batch, length = (
        (2, 32, 4, 97, 2, 16) if size == "tiny" else (6, 384, 6, 8192, 4, 128)
    )
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=length, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    sample = text_sample(BertForMaskedLM(config), vocabulary, batch, length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    sample.inputs["attention_mask"] = mask
    return sample


def t5(size: str) -> Sample:
    from transformers import T5Config, T5ForConditionalGeneration

    layers, width, heads, vocabulary, batch, length = (
        (2, 32, 4, 97, 2, 16) if size == "tiny" else (4, 256, 4, 8192, 2, 128)
    )
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=layers, num_heads=heads,
        dropout_rate=0.0, use_cache=False, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    sample = text_sample(T5ForConditionalGeneration(config), vocabulary, batch, length)
    sample.inputs["decoder_input_ids"] = token_ids(vocabulary, batch, length)
    return sample


def vit(size: str) -> Sample:
    from transformers import ViTConfig, ViTForImageClassification

    layers, width, heads, side, patch, batch = (2, 32, 4, 16, 4, 2) if size == "tiny" else (6, 384, 6, 96, 8, 4)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        image_size=side, patch_size=patch, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    return Sample(model, {"pixel_values": torch.randn(batch, 3, side, side)}, torch.randint(0, 10, (batch,)))


def mamba(size: str) -> Sample:
    from transformers import MambaConfig, MambaForCausalLM

    layers, width, vocabulary, batch, length = (2, 16, 97, 2, 8) if size == "tiny" else (2, 128, 4096, 2, 48)
    config = MambaConfig(
        vocab_size=vocabulary, hidden_size=width, state_size=8, num_hidden_layers=layers, use_cache=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return text_sample(MambaForCausalLM(config), vocabulary, batch, length)


class GatedRecurrentNet(nn.Module):
    """Embedding, gated recurrent cells unrolled over time, and a linear head."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.cells = nn.ModuleList([nn.GRUCell(width, width) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        steps = self.embed(input_ids).unbind(1)
        for cell in self.cells:
            state = torch.zeros_like(steps[0])
            results = []
            for step in steps:
                state = cell(step, state)
                results.append(state)
            steps = tuple(results)
        return self.head(torch.stack(steps, 1))


def gru(size: str) -> Sample:
    vocabulary, width, layers, batch, length = (97, 16, 2, 2, 6) if size == "tiny" else (1024, 256, 2, 8, 24)
    return text_sample(GatedRecurrentNet(vocabulary, width, layers), vocabulary, batch, length)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut (He et al. 2015, figure 2)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...], blocks: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        layers: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(before, width, 2 if stage > 0 and block == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.blocks(self.stem(x))
        return self.head(h.mean((2, 3)))


def resnet(size: str) -> Sample:
    widths, blocks, side, batch = ((8, 16), 2, 12, 3) if size == "tiny" else ((32, 64, 128), 2, 64, 8)
    model = ResNet(widths, blocks, 10)
    return Sample(model, {"x": torch.randn(batch, 3, side, side)}, torch.randint(0, 10, (batch,)))


class Block(nn.Module):
    """A pre-norm residual layer: x + down(dropout(gelu(up(norm(x)))))."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.dropout(F.gelu(self.up(self.norm(x)))))


class Tower(nn.Module):
    """Equal layers in a row and a head: the smallest model with repeated modules. x: [batch, width]."""

    def __init__(self, width: int = 8, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width, dropout) for _ in range(depth)])
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def class_of(module: str, name: str) -> Callable[[], type[nn.Module]]:
    def load() -> type[nn.Module]:
        import importlib

        return getattr(importlib.import_module(f"transformers.models.{module}"), name)  # type: ignore[no-any-return]

    return load


ZOO: dict[str, Entry] = {
    "gpt2": Entry(gpt2, layer=class_of("gpt2.modeling_gpt2", "GPT2Block")),
    "llama": Entry(llama, casts=True, layer=class_of("llama.modeling_llama", "LlamaDecoderLayer")),
    "mixtral": Entry(mixtral, casts=True, layer=class_of("mixtral.modeling_mixtral", "MixtralDecoderLayer")),
    "qwen3_moe": Entry(qwen3_moe, casts=True, layer=class_of("qwen3_moe.modeling_qwen3_moe", "Qwen3MoeDecoderLayer")),
    "bert": Entry(bert, layer=class_of("bert.modeling_bert", "BertLayer")),
    "t5": Entry(t5, casts=True, layer=class_of("t5.modeling_t5", "T5Block")),
    "vit": Entry(vit, layer=class_of("vit.modeling_vit", "ViTLayer")),
    "mamba": Entry(mamba, casts=True, layer=class_of("mamba.modeling_mamba", "MambaBlock")),
    "gru": Entry(gru),
    # Not marked: torch refuses to train through a marked layer that mutates buffers, as batch normalisation does.
    "resnet": Entry(resnet),
}


def build(name: str, size: str = "tiny", seed: int = 0) -> Sample:
    """A fresh model of the zoo with its inputs, float32, equal for equal seeds. size: ``tiny`` or ``bench``."""
    if size not in ("tiny", "bench"):
        raise ValueError(f"size must be 'tiny' or 'bench', not {size!r}")
    torch.manual_seed(seed)
    return ZOO[name].build(size)
