"""Processor time of the stages of planning: each counted once, and told in the log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import effcc
import pytest
import torch
from effcc import stage_times
from effcc.stage_times import StageTimes
from models import Tower


def test_a_stage_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 10.0, 20.0, 22.0])
    monkeypatch.setattr(stage_times.time, "process_time", lambda: next(clock))
    shown: list[str] = []

    @contextlib.contextmanager
    def progress(description: str) -> Iterator[None]:
        shown.append(description)
        yield

    times = StageTimes(progress)
    with times("choice"), times("passes on forward_0 (7 ops)"):
        pass
    with times("passes on backward_0 (9 ops)"):
        pass
    assert times.seconds == {"choice": 7.0, "passes": 3.0 + 2.0}
    assert shown == ["choice", "passes on forward_0 (7 ops)", "passes on backward_0 (9 ops)"]
    assert times.words.startswith("choice 7")


def test_planning_tells_its_stages(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="effcc.plan"):
        effcc.plan(Tower(), (torch.ones(2, 8),), train=True, memory_budget="1GiB", fuse=False)
    (line,) = [record.message for record in caplog.records if "processor time of" in record.message]
    assert all(stage in line for stage in ("capture", "passes", "plan", "choice of activations", "validate"))
