"""Where the time of planning goes: processor seconds of each stage, told in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from .formatting import seconds_text


@dataclass
class StageTimes:
    """Stands before a ``progress`` and counts what its stages take. What runs inside a stage and has a name of its own
    is not counted twice."""

    progress: Callable[[str], AbstractContextManager[None]]
    #: Stage -> seconds, in the order in which they first began. Graphs and their sizes, in brackets or after "on", are
    #: one stage.
    seconds: dict[str, float] = field(default_factory=dict)
    _inside: list[float] = field(default_factory=list)

    @contextmanager
    def __call__(self, description: str) -> Iterator[None]:
        stage = description.partition(" on ")[0].partition(" (")[0]
        self.seconds.setdefault(stage, 0.0)
        self._inside.append(0.0)
        begin = time.process_time()
        try:
            with self.progress(description):
                yield
        finally:
            spent = time.process_time() - begin
            self.seconds[stage] += spent - self._inside.pop()
            if self._inside:
                self._inside[-1] += spent

    @property
    def words(self) -> str:
        return ", ".join(f"{stage} {seconds_text(seconds)}" for stage, seconds in self.seconds.items())
