"""What the allocator's own record says of a run's peak."""

from __future__ import annotations

import torch
from effcc.torch_internals import peak_growth

ELEMENTS = 3000


def test_the_peak_is_of_what_lives_at_once() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return torch.cat([second, second[:100]])

    result, growth = peak_growth(run)
    assert result.numel() == 600
    assert growth == 4 * 1500


def test_what_was_there_before_and_is_freed_meanwhile_hides_nothing() -> None:
    recorded: list[torch.Tensor] = []
    peak_growth(lambda: recorded.extend(torch.empty(ELEMENTS) for _ in range(64)))
    addresses = {each.data_ptr() for each in recorded}
    recorded.clear()
    # Memory that torch's record knows by address, with other values in it now.
    before = [torch.empty(ELEMENTS) for _ in range(64)]
    assert addresses & {each.data_ptr() for each in before}

    def run() -> None:
        before.clear()
        torch.empty(100)

    assert peak_growth(run)[1] == 4 * 100
