"""Token-wise splits: of a saved value the first rows go to the host, the others are computed again (MEMO's alpha).

A share is counted in quarters of the tokens. What is computed again for the rows of a split value needs those rows
alone of the operands that its op reads by rows, and so on up to what is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Shares are in units of 1 / QUARTERS of the tokens.
QUARTERS = 4

#: (value, quarters of its tokens that go to the host); the value is among the swapped ones.
Shares = frozenset[tuple[int, int]]


@dataclass(frozen=True)
class TokenRows:
    """By name of a graph's ops: ``reads`` has for each row-wise op the values that it reads by rows; ``divisible`` are
    the results that may be split. ``tokens``: number of rows."""

    tokens: int = 0
    reads: Mapping[str, frozenset[str]] = field(default_factory=dict)
    divisible: frozenset[str] = frozenset()


def rows_away(tokens: int, quarters: int) -> int:
    """Rows of a split value that go to the host."""
    return tokens * quarters // QUARTERS


def splits(swapped: frozenset[int], divisible: frozenset[int]) -> list[Shares]:
    """Shares for what is swapped whole: one and the same for all values that can be divided, as MEMO has it."""
    able = swapped & divisible
    return [frozenset((v, quarters) for v in able) for quarters in range(1, QUARTERS)] if able else []
