"""The timeline against schedules computed by hand, brute force, and what must hold for every schedule."""

from __future__ import annotations

import itertools
import time

import pytest
from effcc.cost_model.simulator import Timeline, simulate
from effcc.errors import ScheduleError
from effcc.ir.plan import Buffer, Step
from hypothesis import given, settings
from hypothesis import strategies as st


def step(identity: int, seconds: float = 1.0, stream: str = "compute", **rest: object) -> Step:
    return Step(
        id=identity, kind="region", name=f"s{identity}", phase="forward", stream=stream, seconds=seconds, **rest
    )  # type: ignore[arg-type]


def buffer(identity: int, size: int, lower: int, upper: int, tier: str = "device") -> Buffer:
    return Buffer(id=identity, name=f"b{identity}", bytes=size, lower=lower, upper=upper, role="scratch", tier=tier)


def test_swap_behind_compute_by_hand() -> None:
    steps = [
        step(0, 2.0),
        step(1, 5.0, "copy_out", depends=(0,)),
        step(2, 4.0),
        step(3, 3.0, "copy_in", depends=(1,)),
        step(4, 1.0, depends=(3,)),
    ]
    timeline = simulate(steps)
    assert timeline.start == (0.0, 2.0, 2.0, 7.0, 10.0)
    assert timeline.end == (2.0, 7.0, 6.0, 10.0, 11.0)
    assert timeline.makespan == 11.0
    assert timeline.critical_path() == (0, 1, 3, 4)
    compute = timeline.streams[(0, "compute")]
    assert (compute.busy, compute.idle, compute.steps) == (7.0, 4.0, 3)


def test_one_forward_one_backward_pipeline_by_hand() -> None:
    """Two stages, three microbatches, forward 1 and backward 2: 3 · (1 + 2) + the bubble of 3 on each."""
    f, b = 1.0, 2.0
    order = {0: ["F0", "F1", "B0", "F2", "B1", "B2"], 1: ["F0", "B0", "F1", "B1", "F2", "B2"]}
    ids = {(d, name): 10 * d + i for d in order for i, name in enumerate(order[d])}
    steps = []
    for device, names in order.items():
        for name in names:
            source = (
                (0, name) if device == 1 and name[0] == "F" else (1, name) if device == 0 and name[0] == "B" else None
            )
            steps.append(
                step(
                    ids[device, name],
                    f if name[0] == "F" else b,
                    device=device,
                    depends=(ids[source],) if source else (),
                )
            )
    timeline = simulate(steps)
    assert timeline.makespan == 12.0
    assert timeline.streams[(0, "compute")].idle == timeline.streams[(1, "compute")].idle == 3.0


def test_a_collective_starts_when_the_last_has_come_and_ends_with_the_longest() -> None:
    steps = [
        step(0, 1.0),
        step(1, 4.0, device=1),
        step(2, 2.0, "comm", depends=(0,), rendezvous="all-reduce"),
        step(3, 3.0, "comm", device=1, depends=(1,), rendezvous="all-reduce"),
        step(4, 1.0, depends=(2,)),
    ]
    timeline = simulate(steps)
    assert timeline.start[2] == timeline.start[3] == 4.0
    assert timeline.end[2] == timeline.end[3] == 7.0
    assert timeline.end[4] == 8.0
    assert timeline.critical_path() == (1, 2, 4)


def test_two_collectives_in_opposite_orders_never_end() -> None:
    steps = [
        step(0, rendezvous="a"),
        step(1, rendezvous="b"),
        step(2, device=1, rendezvous="b"),
        step(3, device=1, rendezvous="a"),
    ]
    with pytest.raises(ScheduleError, match="circle"):
        simulate(steps)


def test_a_circle_and_an_unknown_step_are_refused() -> None:
    with pytest.raises(ScheduleError, match="circle, among them 0 "):
        simulate([step(0, depends=(1,), stream="a"), step(1, depends=(0,), stream="b")])
    with pytest.raises(ScheduleError, match="depends on step 7"):
        simulate([step(0, depends=(7,))])


def test_memory_over_time() -> None:
    steps = [step(0, 2.0, writes=(0,)), step(1, 3.0, reads=(0,), writes=(1,)), step(2, 1.0, reads=(1,))]
    buffers = [buffer(0, 10, 0, 2), buffer(1, 5, 1, 3), buffer(2, 7, 0, 3, "host")]
    timeline = simulate(steps, buffers)
    assert timeline.memory[(0, "device")] == ((0.0, 10), (2.0, 15), (5.0, 5), (6.0, 0))
    assert timeline.peak() == 15 and timeline.peak("host") == 7 and timeline.peak("disk") == 0


def test_a_buffer_that_a_copy_still_reads_is_held_until_the_copy_ends() -> None:
    steps = [step(0, 1.0, writes=(0,)), step(1, 9.0, "copy_out", depends=(0,), reads=(0,), frees=(0,)), step(2, 2.0)]
    timeline = simulate(steps, [buffer(0, 10, 0, 2)])
    assert timeline.memory[(0, "device")] == ((0.0, 10), (10.0, 0))


def test_memory_is_counted_per_device() -> None:
    steps = [step(0, writes=(0,)), step(1, device=1, writes=(1,))]
    timeline = simulate(steps, [buffer(0, 3, 0, 1), buffer(1, 4, 1, 2)])
    assert timeline.peak(device=0) == 3 and timeline.peak(device=1) == 4


def test_nothing_takes_no_time() -> None:
    timeline = simulate([])
    assert (timeline.makespan, timeline.critical_path(), dict(timeline.streams)) == (0.0, (), {})


def brute_force(steps: list[Step]) -> list[float]:
    """Begin times as the least fixed point: raise each begin until no rule is broken."""
    start = [0.0] * len(steps)
    index = {s.id: i for i, s in enumerate(steps)}
    changed = True
    while changed:
        changed = False
        for i, s in enumerate(steps):
            before = [index[d] for d in s.depends]
            before += [j for j in range(i) if (steps[j].device, steps[j].stream) == (s.device, s.stream)][-1:]
            wanted = max([start[j] + steps[j].seconds for j in before], default=0.0)
            if wanted > start[i]:
                start[i], changed = wanted, True
    return start


@st.composite
def schedules(draw: st.DrawFn) -> list[Step]:
    count = draw(st.integers(1, 14))
    made = []
    for i in range(count):
        depends = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        made.append(
            step(
                i,
                draw(st.integers(0, 8)) / 4,
                draw(st.sampled_from(["compute", "copy_in", "copy_out"])),
                device=draw(st.integers(0, 1)),
                depends=tuple(sorted(depends)),
            )
        )
    return made


def longest_chain(steps: list[Step]) -> float:
    end: dict[int, float] = {}
    for s in steps:
        end[s.id] = s.seconds + max((end[d] for d in s.depends), default=0.0)
    return max(end.values())


def check(steps: list[Step], timeline: Timeline) -> None:
    assert list(timeline.start) == brute_force(steps)
    assert timeline.makespan >= longest_chain(steps)
    by_stream: dict[tuple[int, str], list[int]] = {}
    for i, s in enumerate(steps):
        by_stream.setdefault((s.device, s.stream), []).append(i)
        assert timeline.end[i] == timeline.start[i] + s.seconds
        assert all(timeline.end[d] <= timeline.start[i] for d in s.depends)
    for key, members in by_stream.items():
        assert timeline.makespan >= sum(steps[i].seconds for i in members)
        assert timeline.streams[key].busy == pytest.approx(sum(steps[i].seconds for i in members))
        assert all(timeline.end[a] <= timeline.start[b] for a, b in itertools.pairwise(members))


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_every_schedule(steps: list[Step]) -> None:
    timeline = simulate(steps)
    check(steps, timeline)
    path = timeline.critical_path()
    assert timeline.end[path[-1]] == timeline.makespan
    assert sum(steps[i].seconds for i in path) == pytest.approx(timeline.makespan)


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(0, 13), st.integers(1, 8))
def test_more_work_never_ends_sooner(steps: list[Step], which: int, extra: int) -> None:
    which %= len(steps)
    s = steps[which]
    longer = step(s.id, s.seconds + extra / 4, s.stream, device=s.device, depends=s.depends)
    slower = simulate([*steps[:which], longer, *steps[which + 1 :]])
    before = simulate(steps)
    assert slower.makespan >= before.makespan
    assert all(a >= b for a, b in zip(slower.end, before.end, strict=True))


def test_a_hundred_thousand_steps_in_about_a_second() -> None:
    streams = ("compute", "copy_in", "copy_out", "disk")
    steps = [
        step(i, 1e-5 * (i % 7), streams[i % 4], depends=(i - 3,) if i > 3 else (), writes=(i,), device=i % 3)
        for i in range(100_000)
    ]
    buffers = [buffer(i, 64, i, i + 1) for i in range(100_000)]
    begin = time.process_time()
    timeline = simulate(steps, buffers)
    assert time.process_time() - begin < 3.0  # 0.5 s alone on the machine; room for a busy one
    assert timeline.makespan > 0
