"""``EFFCC_LOGS``: topics, levels, what is printed, and that work is quiet without it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import Effcc, refused
from effcc import logs
from effcc.errors import OptionError
from fresh_seed import fresh_random


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    logs.set_up("")
    for topic in logs.TOPICS:
        logs.logger(topic).setLevel(logging.NOTSET)


def test_topics_and_levels() -> None:
    assert logs.parse("") == {}
    assert logs.parse("plan, +passes,-solver") == {
        "plan": logging.INFO,
        "passes": logging.DEBUG,
        "solver": logging.ERROR,
    }
    assert logs.parse("all,+plan") == {topic: logging.INFO for topic in logs.TOPICS} | {"plan": logging.DEBUG}
    with pytest.raises(OptionError, match="Did you mean 'passes'"):
        logs.parse("pases")


def test_only_what_is_asked_for_is_told(effcc: Effcc, dead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert effcc("opt", dead, "-p", "dead-code,dead-code").err == ""
    monkeypatch.setenv("EFFCC_LOGS", "passes")
    told = effcc("opt", dead, "-p", "dead-code,dead-code").err.splitlines()
    assert len(told) == 1 and re.fullmatch(r"\[effcc passes\] dead-code on g: 5 -> 4 ops, [\d.]+ ms", told[0])
    monkeypatch.setenv("EFFCC_LOGS", "+passes")
    told = effcc("opt", dead, "-p", "dead-code,dead-code").err.splitlines()
    assert len(told) == 2 and "unchanged" in told[1]
    monkeypatch.setenv("EFFCC_LOGS", "plan")
    assert effcc("opt", dead, "-p", "dead-code").err == ""
    monkeypatch.setenv("EFFCC_LOGS", "pases")
    refused(effcc("opt", dead), "pases", "EFFCC_LOGS")


def test_progress_of_long_work_is_what_it_logs() -> None:
    told: list[str] = []
    with logs.watching(told.append):
        logs.logger("solver").info("offsets: %d bytes", 12)
        logs.logger("solver").debug("detail")
    logs.logger("solver").info("afterwards")
    assert told == ["offsets: 12 bytes"]


def test_the_solver_of_offsets_tells_its_value_and_bound() -> None:
    from effcc.cost_model.offset_assignment.problem import Problem
    from effcc.cost_model.offset_assignment.solver import solve

    told: list[str] = []
    lower, upper, size = np.array([0, 2, 4]), np.array([3, 6, 8]), np.array([4, 2, 3])
    with logs.watching(told.append):
        result = solve(Problem(lower, upper, size, np.ones(3, np.int64)))
    assert told == [f"offsets of 3 buffers: {result.height} bytes, bound {result.lower_bound} bytes, gap 0.00 %"]


def test_the_documentation_has_every_topic() -> None:
    text = (Path(__file__).parent.parent / "docs" / "options.md").read_text()
    section = text.partition("### Logs")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(logs.TOPICS)


def test_the_solver_of_placements_tells_its_value() -> None:
    from effcc.cost_model.expert_placement.problem import Problem
    from effcc.cost_model.expert_placement.solver import solve

    generator = np.random.default_rng(fresh_random().getrandbits(32))
    counts = generator.integers(1, 50, (2, 8, 8)).astype(float)
    loads = np.stack([counts[0].sum(1), counts[0].sum(0), counts[1].sum(0)])
    told: list[str] = []
    with logs.watching(told.append):
        found = solve(Problem(loads, counts, 4), time_limit=2.0)
    values = [float(match[1]) for line in told if (match := re.match(r"experts: ([\d.e+]+)", line))]
    assert values and values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(found.objective, rel=1e-4)
