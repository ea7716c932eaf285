"""Copies to the host and back: when they run, counted by hand; choices with them against brute force."""

from __future__ import annotations

import itertools

import pytest
from effcc.passes.activation.baselines import memo_share
from effcc.passes.activation.candidates import evaluate
from effcc.passes.activation.host_link import Copy, HostLink, copy_windows
from effcc.passes.activation.search import ActivationSearch
from effcc.passes.activation.simulate import Simulator
from fresh_seed import fresh_random
from random_joints import random_joint

#: Ten bytes a second each way.
LINK = HostLink(out=10.0, back=10.0, latency=0.0, capacity=1 << 40, overlapped=True)


def test_a_copy_back_begins_just_in_time() -> None:
    # Entries of one second each, the backward from 5 on; 20 bytes take two seconds.
    found = copy_windows([1.0] * 10, 5, [Copy(0, 20, made=0, used=9)], LINK)
    assert (found.released, found.issued, found.stall) == ({0: 2}, {0: 7}, 0.0)


def test_copies_take_turns_on_their_engines() -> None:
    copies = [Copy(0, 20, made=0, used=9), Copy(1, 20, made=1, used=9)]
    found = copy_windows([1.0] * 10, 5, copies, LINK)
    assert found.released == {0: 2, 1: 4}
    assert found.issued == {0: 5, 1: 7} and found.stall == 0.0


def test_the_step_waits_where_there_is_no_time() -> None:
    # The copy back cannot begin before the backward does, at 5 s, and takes 2 s of which only one is there.
    found = copy_windows([1.0] * 10, 5, [Copy(0, 20, made=0, used=6)], LINK)
    assert found.issued == {0: 5} and found.stall == pytest.approx(1.0)
    # What is still on its way out comes back later still: out from 5 to 7, back from 7 to 9.
    late = copy_windows([1.0] * 10, 5, [Copy(0, 20, made=4, used=6)], LINK)
    assert late.stall == pytest.approx(3.0)


def test_on_a_cpu_the_process_copies() -> None:
    found = copy_windows([1.0] * 10, 5, [Copy(0, 20, made=0, used=9)], HostLink(10.0, 20.0, 0.5, 1 << 40, False))
    assert (found.released, found.issued) == ({0: 0}, {0: 9})
    assert found.stall == pytest.approx(2.5 + 1.5)


def test_bounds_hold_for_all_choices_with_copies() -> None:
    rng = fresh_random()
    for _ in range(12):
        problem = random_joint(rng, ops=4)
        size = sum(value.bytes for value in problem.values)
        link = HostLink(rng.uniform(1, 20), rng.uniform(1, 20), 0.0, rng.randint(1, size), True)
        search = ActivationSearch(problem, link=link)
        simulator = Simulator(search.problem, link)  # keeping costs what the search takes it for
        made = sorted(simulator.made_forward - simulator.outputs)
        choices = []
        for fates in itertools.product((0, 1, 2), repeat=len(made)):
            kept = frozenset(v for v, fate in zip(made, fates, strict=True) if fate == 1) | simulator.outputs
            away = frozenset(v for v, fate in zip(made, fates, strict=True) if fate == 2)
            choices.append(evaluate(simulator, kept, away))
        bytes_away = [sum(problem.values[v].bytes for v in c.swapped) for c in choices]
        allowed = [c for c, away in zip(choices, bytes_away, strict=True) if away <= link.capacity]
        least, most = min(c.peak for c in allowed), max(c.peak for c in allowed)
        for share in (0.1, 0.4, 0.7):
            limit = int(least + share * (most - least))
            best = min(c.seconds for c in allowed if c.peak <= limit)
            assert search.bound(limit) <= best + 1e-5
            found = search.within(limit)
            if found is not None:
                assert found.peak <= limit and found.seconds >= best - 1e-6
                assert sum(problem.values[v].bytes for v in found.swapped) <= link.capacity


def test_memos_share_is_what_time_and_room_allow() -> None:
    # In time: 100 bytes of which 10 always go; in room: (8 - 2) layers, 60 bytes each.
    roomy = HostLink(10.0, 10.0, 0.0, 10**6, True)
    assert memo_share(10, 180, 8, 10.0, roomy) == pytest.approx(0.5)
    assert memo_share(10, 180, 8, 100.0, roomy) == 1.0
    assert memo_share(10, 180, 8, 10.0, HostLink(10.0, 10.0, 0.0, 360, True)) == pytest.approx(50 / 180)
    assert memo_share(200, 180, 8, 10.0, roomy) < 0
