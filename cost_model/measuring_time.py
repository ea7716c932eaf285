"""Where the time of a calibration goes: a budget of seconds that is shared out, and an account of what was spent.

What is measured keeps to the budget as far as the fewest rounds of each part allow; what is compiled first counts
apart. Both are told under the log topic ``calibrate``, part by part.

What else runs on a machine comes and goes within seconds. So all is measured in two passes, one after the other, and
where they differ the faster one is believed (``agreed``).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

#: Seconds that a calibration measures for where nothing else is asked.
SECONDS = 24.0
#: Times further apart than this share of the shorter one: something else ran beside the longer one.
APART = 0.1


@dataclass(frozen=True)
class Part:
    """``seconds`` by the clock; ``processor`` seconds of this process and of the compilers that it has waited for."""

    name: str
    compiled: bool
    seconds: float
    processor: float


@dataclass
class Account:
    """``budget``: seconds to measure."""

    budget: float = SECONDS
    parts: list[Part] = field(default_factory=list)

    @property
    def measured(self) -> float:
        """Seconds that measuring took so far."""
        return sum(part.seconds for part in self.parts if not part.compiled)

    @property
    def compiled(self) -> float:
        """Seconds that compiling took so far, with the tracing of what is compiled."""
        return sum(part.seconds for part in self.parts if part.compiled)

    @property
    def left(self) -> float:
        """Seconds of the budget that are not spent yet."""
        return max(0.0, self.budget - self.measured)

    @contextlib.contextmanager
    def part(self, name: str, compiled: bool = False) -> Iterator[None]:
        """What is done inside counts as this part."""
        from ..logs import logger

        begin, processor = time.perf_counter(), _processor_seconds()
        yield
        spent = Part(name, compiled, time.perf_counter() - begin, _processor_seconds() - processor)
        self.parts.append(spent)
        word = "compiled" if compiled else "measured"
        logger("calibrate").info("%s: %s in %.1f s (%.1f s of processors)", name, word, spent.seconds, spent.processor)


def agreed(first: Mapping[Key, float], second: Mapping[Key, float]) -> dict[Key, float]:
    """Seconds of what was measured in two passes: the mean, or the shorter where both are ``APART``; what only one
    pass measured as it is."""
    found = dict(first)
    for key, seconds in second.items():
        low, high = sorted((seconds, found.get(key, seconds)))
        found[key] = (low + high) / 2 if high <= (1 + APART) * low else low
    return found


def agreed_together(first: Mapping[Key, float], second: Mapping[Key, float]) -> dict[Key, float]:
    """As ``agreed``, for what is compared, as by a difference: all is believed of both passes, or of the faster one."""
    totals = sum(first.values()), sum(second.values())
    if max(totals) > (1 + APART) * min(totals):
        return dict(first if totals[0] < totals[1] else second)
    return {key: (seconds + second[key]) / 2 for key, seconds in first.items()}


def _processor_seconds() -> float:
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def fair_shares(wanted: Sequence[float], budget: float) -> list[float]:
    """Seconds for each of those who want ``wanted``: all that they want and as much more in proportion where the budget
    is enough, else all that they want for those who want little, and the same for all others."""
    total = sum(wanted)
    if total <= budget:
        return [each * budget / total if total else 0.0 for each in wanted]
    level, left, others = 0.0, budget, len(wanted)
    for each in sorted(wanted):
        level = left / others
        if each > level:
            break
        left, others = left - each, others - 1
    return [min(each, level) for each in wanted]
