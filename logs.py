"""``EFFCC_LOGS``: what effcc tells while it works, chosen as ``TORCH_LOGS`` chooses for PyTorch.

``EFFCC_LOGS="plan,+passes,-solver"`` shows the topic ``plan`` at level INFO, ``passes`` at DEBUG, of ``solver`` errors
alone; ``all`` stands for every topic. Each topic is the logger ``effcc.<topic>``, so that Python's own ``logging``
can be used in its place. Long work logs its progress under these topics too: that is what a terminal shows beside the
spinner.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping

from .errors import OptionError

#: Topic -> what is logged under it.
TOPICS = {
    "capture": "models captured, graph breaks, repeated modules",
    "passes": "each pass: time, ops before and after; +passes: what did not change too",
    "plan": "plans made: steps, peak, time; processor time of each stage of planning",
    "solver": "solvers: value, bound and gap as they fall",
    "compile": "graphs compiled in torch.compile, and compiled again; regions, one of how many",
    "cascades": "cascades fused, and why others were not",
    "calibrate": "each part of a calibration: time; what was not measured, and why; +calibrate: cut shapes",
}
VARIABLE = "EFFCC_LOGS"
_ROOT = "effcc"


def logger(topic: str) -> logging.Logger:
    """The logger of a topic."""
    return logging.getLogger(f"{_ROOT}.{topic}")


def set_up(setting: str | None = None) -> None:
    """Apply ``EFFCC_LOGS``, or ``setting`` in its place. Raises OptionError for a topic that does not exist."""
    text = os.environ.get(VARIABLE, "") if setting is None else setting
    chosen = parse(text)
    root = logging.getLogger(_ROOT)
    for handler in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(handler)
    if chosen:
        root.addHandler(_Handler(chosen))
    for topic, level in chosen.items():
        logger(topic).setLevel(level)


@functools.cache
def set_up_once() -> None:
    """``set_up`` for those who use effcc as a library. Raises OptionError."""
    set_up()


def parse(text: str) -> dict[str, int]:
    """Topic -> level. Raises OptionError."""
    chosen: dict[str, int] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, level = word.lstrip("+-"), logging.INFO
        if word[0] in "+-":
            level = logging.DEBUG if word[0] == "+" else logging.ERROR
        if name != "all" and name not in TOPICS:
            close = difflib.get_close_matches(name, TOPICS, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise OptionError(
                f"{VARIABLE}: there is no topic {name!r}",
                where=f"{VARIABLE}={text}",
                remedy=f"{hint}The topics are: {', '.join(TOPICS)}, all; + before one shows more, - less.",
            )
        chosen.update(dict.fromkeys(TOPICS if name == "all" else (name,), level))
    return chosen


class _Handler(logging.Handler):
    """One line on standard error, as that is at the moment (a test or a notebook may have exchanged it), for the topics
    that were chosen."""

    def __init__(self, levels: Mapping[str, int]) -> None:
        super().__init__()
        self.levels = levels

    def emit(self, record: logging.LogRecord) -> None:
        topic = record.name.removeprefix(f"{_ROOT}.")
        if record.levelno >= self.levels.get(topic, logging.CRITICAL):
            print(f"[effcc {topic}] {record.getMessage()}", file=sys.stderr)


def tell_gap(what: str, value: float, bound: float, text: Callable[[float], str] = "{:.6g}".format) -> None:
    """How far a solver that minimises has come, once it has a bound: value, bound, the gap as a share of the value."""
    if math.isfinite(bound):
        gap = 100 * max(value - bound, 0.0) / abs(value) if value else 0.0
        logger("solver").info("%s: %s, bound %s, gap %.2f %%", what, text(value), text(bound), gap)


class _Watch(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(record.getMessage())


@contextlib.contextmanager
def watching(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``tell`` is given every message of level INFO: the progress of long work."""
    root, handler = logging.getLogger(_ROOT), _Watch(tell)
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
