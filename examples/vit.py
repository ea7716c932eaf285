"""A ViT classifier (ViT-S/16 at 224 pixels) with its own loss function.

effcc plan examples/vit.py --train --optimizer sgd_momentum
"""

import torch
from transformers import ViTConfig, ViTForImageClassification

CONFIG = ViTConfig(
    hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
)
BATCH = 8


def model() -> ViTForImageClassification:
    return ViTForImageClassification(CONFIG)


def example_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 224, 224)}


def targets() -> tuple[torch.Tensor]:
    return (torch.randint(0, 1000, (BATCH,)),)


def loss(outputs, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)


def optimizer(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
