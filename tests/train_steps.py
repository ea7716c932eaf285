"""A small model for ``effcc.train_step``, batches for it, and the ordinary training loop to compare with."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effcc import train_step
from effcc.errors import BudgetError
from effcc.measuring import peak_of
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]
MakeOptimizer = Callable[..., torch.optim.Optimizer]


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Network(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3, words: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def network(**settings: Any) -> Network:
    torch.manual_seed(0)
    return Network(**settings)


def loss_of(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), target.flatten())


def batches(count: int, words: int = 64, length: int = 16) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    draw = lambda: torch.randint(0, words, (2, length), generator=random)  # noqa: E731
    return [(draw(), draw()) for _ in range(count)]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def ordinary(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Any],
    loss_fn: Callable[..., torch.Tensor] = loss_of,
    clip: Callable[[nn.Module], Any] = lambda model: None,
    accumulate: int = 1,
    scheduler: Any = None,
) -> list[float]:
    """Losses of the loop that everybody writes."""
    torch.manual_seed(5)
    losses = []
    for index, (inputs, target) in enumerate(data):
        loss = loss_fn(model(**inputs) if isinstance(inputs, dict) else model(inputs), target)
        loss.backward()
        losses.append(loss.item())
        if (index + 1) % accumulate == 0:
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return losses


def stepped(step: Any, data: Sequence[Any]) -> list[float]:
    """Losses of a ``TrainStep``."""
    torch.manual_seed(5)
    return [step(*batch).item() for batch in data]


def same_values(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip([*a.parameters(), *a.buffers()], [*b.parameters(), *b.buffers()], strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def measured_peak(step: Any, batch: Batch) -> int:
    """Most bytes that one more call held, everything counted, by the allocator's own record."""
    step(*batch)  # what was looked at since the last call leaves; the profiler would not see it go
    held = step.held_bytes(batch)
    return held + peak_of(lambda: step(*batch), torch.device("cpu"))


def state_bytes(model: nn.Module, copies: int = 4) -> int:
    """Parameters, gradients and the two states of Adam."""
    return copies * sum(parameter.nbytes for parameter in model.parameters())


def pair(model: nn.Module, make: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of ``model`` with an optimizer of its own."""
    twin = copy.deepcopy(model)
    return twin, make(twin.parameters())


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As the format's own description says: length, JSON, bytes."""
    import json

    names = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, value in tensors.items():
        ends = [offset, offset + value.nbytes]
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": ends}
        offset += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(value.contiguous().flatten().view(torch.uint8).numpy().tobytes() for value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def floor_of(model: nn.Module, make: Any = adamw, data: Any = None, **settings: Any) -> int:
    """The least budget, as the error names it."""
    twin, optimizer = pair(model, make)
    with pytest.raises(BudgetError) as caught:
        train_step(twin, optimizer, loss_of, memory_budget=1, **settings)(*(data or batches(1))[0])
    assert same_values(twin, model), "a refused step changes nothing"
    found = re.search(r"least budget that works is (\d+) bytes", str(caught.value))
    assert found is not None, str(caught.value)
    return int(found[1])
