"""Pipeline plans of a step: balanced stages, the fastest schedule that fits, reasons where none does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effcc.cost_model.devices import load_device
from effcc.errors import ScheduleError
from effcc.passes.pipeline_parallel.simulate import simulate
from effcc.runtime.pipeline.plan import PipelinePlan, make_schedule, plan_pipeline
from pipeline_worker import build


def planned(vocabulary: int, **more: Any) -> PipelinePlan:
    settings: dict[str, Any] = {"ranks": 2, "microbatches": 4, "device": load_device("a100-80g"), "time_limit": 0.5}
    ids = torch.zeros(2, 8, dtype=torch.long)
    return plan_pipeline(build("plain", 4, vocabulary), (ids, ids), **settings | more)


@pytest.mark.slow
def test_vocabulary_is_sharded_where_it_pays() -> None:
    """A large output layer makes a stage too slow; a small one is not worth the barriers."""
    large, small = planned(50_000), planned(11)
    assert large.schedule.vocabulary
    assert not small.schedule.vocabulary
    assert [seconds for _, seconds, _ in small.others if seconds is not None] == sorted(
        seconds for _, seconds, _ in small.others if seconds is not None
    )
    for found in (large, small):
        found.schedule.check()
        assert found.found.bound <= found.found.run.seconds == simulate(found.schedule, found.costs).seconds


def test_memory_decides() -> None:
    """GPipe holds all microbatches; what it needs is more than 1F1B's."""
    whole = planned(11, schedules=("gpipe", "1f1b"), vocabularies=("",))
    peaks = {whole.schedule.name: max(whole.found.run.peak), **{name: peak for name, _, peak in whole.others}}
    assert peaks["gpipe"] > peaks["1f1b"]
    least = planned(11, schedules=("1f1b",), vocabularies=("",), memory=peaks["1f1b"])
    assert max(least.found.run.peak) <= peaks["1f1b"]
    with pytest.raises(ScheduleError, match="memory limit"):
        planned(11, schedules=("1f1b",), vocabularies=("",), memory=1000)


def test_unknown_schedules() -> None:
    with pytest.raises(ScheduleError, match="unknown"):
        make_schedule("2f2b", 2, 4)
    with pytest.raises(ScheduleError, match="not woven"):
        make_schedule("gpipe", 2, 4, "one-barrier")
