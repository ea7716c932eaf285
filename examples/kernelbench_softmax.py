"""A problem in KernelBench's convention: class Model, get_inputs() and get_init_inputs().

effcc plan examples/kernelbench_softmax.py
"""

import torch
import torch.nn as nn


class Model(nn.Module):
    """Attention scores with a soft cap, softmax over the keys, and the weighted sum of the values."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        scores = self.cap * torch.tanh(scores / self.cap)
        return torch.softmax(scores, dim=-1) @ value


batch_size, heads, sequence, width = 2, 8, 1024, 64


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(batch_size, heads, sequence, width) for _ in range(3)]


def get_init_inputs() -> list[float]:
    return [30.0]
