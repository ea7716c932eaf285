"""Live ranges and peaks against a count position by position."""

from __future__ import annotations

from effcc.cost_model.liveness import by_role, live_bytes, live_ranges, peak_holders, reserved_bytes
from effcc.ir.plan import Buffer, Step
from hypothesis import given, settings
from hypothesis import strategies as st


def step(identity: int, reads: tuple[int, ...] = (), writes: tuple[int, ...] = (), frees: tuple[int, ...] = ()) -> Step:
    return Step(id=identity, kind="region", name="s", phase="forward", reads=reads, writes=writes, frees=frees)


def buffer(identity: int, size: int, lower: int, upper: int, **rest: object) -> Buffer:
    fields: dict[str, object] = {"name": f"b{identity}", "role": "scratch"} | rest
    return Buffer(id=identity, bytes=size, lower=lower, upper=upper, **fields)  # type: ignore[arg-type]


def test_ranges_of_a_chain() -> None:
    steps = [step(0, (9,), (0,)), step(1, (0,), (1,)), step(2, (), (2,)), step(3, (1, 2), (3,))]
    assert live_ranges(steps, given=[9], escaping=[0]) == {9: (0, 1), 0: (0, 4), 1: (1, 4), 2: (2, 4), 3: (3, 4)}


def test_explicit_free_ends_a_range_later_than_the_last_use() -> None:
    steps = [step(0, (), (0,)), step(1), step(2, (), (), (0,)), step(3)]
    assert live_ranges(steps) == {0: (0, 3)}


def test_peak_and_holders() -> None:
    buffers = [
        buffer(0, 100, 0, 4, role="parameter"),
        buffer(1, 50, 0, 2, role="saved"),
        buffer(2, 60, 1, 3, role="saved"),
        buffer(3, 500, 0, 4, tier="host"),
    ]
    timeline = live_bytes(buffers, 4)
    assert timeline.bytes == (150, 210, 160, 100)
    assert (timeline.peak, timeline.peak_position) == (210, 1)
    holders = peak_holders(buffers, 4)
    assert [(h.buffer.id, round(h.share, 3)) for h in holders] == [(0, 0.476), (2, 0.286), (1, 0.238)]
    assert by_role(buffers, 1) == {"saved": 110, "parameter": 100}


def test_arenas_are_held_in_full() -> None:
    buffers = [
        buffer(0, 100, 0, 5),
        buffer(1, 64, 1, 2, offset=0, pool="saved"),
        buffer(2, 64, 3, 4, offset=0, pool="saved"),
        buffer(3, 32, 2, 3, offset=0, pool="scratch"),
    ]
    assert reserved_bytes(buffers, {"device/saved": 64, "device/scratch": 40}, 5).bytes == (100, 164, 204, 164, 100)


@st.composite
def programs(draw: st.DrawFn) -> list[Step]:
    steps: list[Step] = []
    for i in range(draw(st.integers(1, 12))):
        reads = tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)))) if i else ()
        steps.append(step(i, reads, (i,)))
    return steps


@settings(max_examples=100, deadline=None)
@given(programs(), st.lists(st.integers(0, 1000), min_size=12, max_size=12))
def test_peak_is_the_greatest_count(steps: list[Step], sizes: list[int]) -> None:
    ranges = live_ranges(steps)
    buffers = [buffer(i, sizes[i], *ranges[i]) for i in ranges]
    # A value is needed at p if it was made by then and some step from p on reads it, or p makes it.
    counts = [
        sum(sizes[v] for v in ranges if v == p or (v < p and any(v in s.reads for s in steps[p:])))
        for p in range(len(steps))
    ]
    timeline = live_bytes(buffers, len(steps))
    assert list(timeline.bytes) == counts
    assert sum(h.buffer.bytes for h in peak_holders(buffers, len(steps))) == max(counts)
