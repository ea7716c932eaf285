"""Live bytes and peaks against a count position by position."""

from __future__ import annotations

from effcc.cost_model.liveness import by_role, live_bytes, reserved_bytes
from effcc.ir.plan import Buffer
from hypothesis import given, settings
from hypothesis import strategies as st


def buffer(identity: int, size: int, lower: int, upper: int, **rest: object) -> Buffer:
    fields: dict[str, object] = {"name": f"b{identity}", "role": "scratch"} | rest
    return Buffer(id=identity, bytes=size, lower=lower, upper=upper, **fields)  # type: ignore[arg-type]


def test_peak_and_roles() -> None:
    buffers = [
        buffer(0, 100, 0, 4, role="parameter"),
        buffer(1, 50, 0, 2, role="saved"),
        buffer(2, 60, 1, 3, role="saved"),
        buffer(3, 500, 0, 4, tier="host"),
    ]
    timeline = live_bytes(buffers, 4)
    assert timeline.bytes == (150, 210, 160, 100)
    assert (timeline.peak, timeline.peak_position) == (210, 1)
    assert by_role(buffers, 1) == {"saved": 110, "parameter": 100}


def test_arenas_are_held_in_full() -> None:
    buffers = [
        buffer(0, 100, 0, 5),
        buffer(1, 64, 1, 2, offset=0, pool="saved"),
        buffer(2, 64, 3, 4, offset=0, pool="saved"),
        buffer(3, 32, 2, 3, offset=0, pool="scratch"),
    ]
    assert reserved_bytes(buffers, {"device/saved": 64, "device/scratch": 40}, 5).bytes == (100, 164, 204, 164, 100)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 11), st.integers(1, 12)), max_size=12))
def test_the_bytes_at_each_position_are_those_of_the_buffers_live_there(drawn: list[tuple[int, int, int]]) -> None:
    buffers = [buffer(i, size, lower, lower + length) for i, (size, lower, length) in enumerate(drawn)]
    timeline = live_bytes(buffers, 24)
    counts = [sum(b.bytes for b in buffers if b.lower <= position < b.upper) for position in range(24)]
    assert list(timeline.bytes) == counts
    assert timeline.peak == max(counts) == counts[timeline.peak_position]
    assert all(sum(by_role(buffers, position).values()) == counts[position] for position in range(24))
