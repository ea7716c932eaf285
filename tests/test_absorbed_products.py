"""Products that Inductor computes inside another op's call are priced with it: none is lost from a compiled plan."""

import effcc
import pytest
import torch
from fresh_seed import fresh_random
from torch import nn


class Tied(nn.Module):
    """A vocabulary that embeds the words and scores them: its gradient is the sum of a product and a scatter."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.inner = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(self.words(tokens))) @ self.words.weight.t()


@pytest.mark.parametrize("tokens", [24, 56])
def test_every_product_is_priced(tokens: int) -> None:
    torch.manual_seed(fresh_random().randrange(1 << 30))
    words, width = 320, 48
    model = Tied(words, width)
    effcc.reset_reports()
    run = torch.compile(model, backend="effcc", dynamic=False)
    run(torch.randint(0, words, (tokens,))).logsumexp(-1).sum().backward()
    plan = effcc.reports()[-1].plan
    assert plan is not None
    library = [step for step in plan.steps if step.kind == "library"]
    named = {op for step in library for op in step.ops}
    products = 3 * (2 * tokens * words * width + 2 * tokens * width * width)
    assert sum(step.flop for step in library) >= products, sorted(named)
    for step in library:
        if "addmm" in step.name and any(op.startswith("add_") for op in step.ops):
            assert any(op.startswith("mm") for op in step.ops), step
