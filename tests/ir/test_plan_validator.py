"""The independent validator: a sound plan passes, and each kind of fault is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from effcc.errors import PlanError
from effcc.ir.mapping_validator import validate_mapping
from effcc.ir.overlaps import Piece, overlaps
from effcc.ir.plan import Buffer, GraphPlan, Plan, Step
from effcc.ir.plan_validator import problems, validate
from fresh_seed import fresh_random
from hypothesis import given, settings
from hypothesis import strategies as st
from work import calls_made

replace = msgspec.structs.replace


def sound_plan() -> Plan:
    """x -> a -> b -> out on one stream, with b swapped out and in again on two more."""
    return Plan(
        model="m",
        device="cpu",
        training=False,
        graphs=(GraphPlan(name="g", graph_hash="h", op_hashes=("1", "2", "3"), first_step=0, last_step=4),),
        steps=(
            Step(id=0, kind="region", name="s0", phase="forward", reads=(0,), writes=(1,), start=0.0, seconds=1.0),
            Step(
                id=1,
                kind="region",
                name="s1",
                phase="forward",
                reads=(1,),
                writes=(2,),
                frees=(1,),
                start=1.0,
                seconds=1.0,
            ),
            Step(
                id=2,
                kind="swap_out",
                name="s2",
                phase="forward",
                stream="out",
                reads=(2,),
                writes=(3,),
                depends=(1,),
                start=2.0,
                seconds=1.0,
                frees=(2,),
            ),
            Step(
                id=3,
                kind="swap_in",
                name="s3",
                phase="forward",
                stream="in",
                reads=(3,),
                writes=(4,),
                depends=(2,),
                start=3.0,
                seconds=1.0,
                frees=(3,),
            ),
            Step(
                id=4,
                kind="region",
                name="s4",
                phase="forward",
                reads=(4,),
                writes=(5,),
                depends=(3,),
                start=4.0,
                seconds=1.0,
                frees=(4,),
            ),
        ),
        buffers=(
            Buffer(id=0, name="x", bytes=100, lower=0, upper=5, role="input"),
            Buffer(id=1, name="a", bytes=128, lower=0, upper=2, role="scratch", offset=0),
            Buffer(id=2, name="b", bytes=64, lower=1, upper=3, role="saved", offset=128),
            Buffer(id=3, name="b.host", bytes=64, lower=2, upper=4, role="saved", offset=0, tier="host"),
            Buffer(id=4, name="b.again", bytes=64, lower=3, upper=5, role="saved", offset=0),
            Buffer(id=5, name="out", bytes=10, lower=4, upper=5, role="output"),
        ),
        seconds=5.0,
        peak={"device": 100 + 192 + 10, "host": 64},
        arena={"device": 192, "host": 64},
        budget=302,
    )


def changed_step(index: int, **fields: Any) -> Plan:
    plan = sound_plan()
    return replace(plan, steps=tuple(replace(s, **fields) if i == index else s for i, s in enumerate(plan.steps)))


def changed_buffer(index: int, **fields: Any) -> Plan:
    plan = sound_plan()
    return replace(plan, buffers=tuple(replace(b, **fields) if i == index else b for i, b in enumerate(plan.buffers)))


def test_sound_plan_passes() -> None:
    assert problems(sound_plan()) == []
    validate(sound_plan())


FAULTS = {
    "overlap": (
        changed_buffer(2, offset=64),
        "buffer 1 ('a') and buffer 2 ('b') overlap in the device arena at position 1",
    ),
    "beyond the arena": (
        changed_buffer(2, offset=192),
        "offset 192 + 64 bytes is beyond the 192 bytes of the device arena",
    ),
    "no arena": (replace(sound_plan(), arena={"device": 192}), "no arena"),
    "negative offset": (changed_buffer(4, offset=-64), "offset -64 is negative"),
    "misaligned": (changed_buffer(4, offset=32), "offset 32 is not a multiple of its alignment 64"),
    "use before definition": (changed_step(0, reads=(0, 1)), "reads buffer 1 ('a') before any step has written it"),
    "use outside lifetime": (changed_step(3, reads=(3, 1)), "uses buffer 1 ('a') after step 1 freed it"),
    "write outside lifetime": (changed_buffer(3, lower=3), "at position 2 uses buffer 3 ('b.host') outside [3, 4)"),
    "use after free": (changed_step(0, frees=(1,)), "step 1 ('s1') uses buffer 1 ('a') after step 0 freed it"),
    "double free": (changed_step(4, frees=(4, 2)), "frees buffer 2 ('b') a second time"),
    "free of never made": (changed_step(0, frees=(5,)), "frees buffer 5 ('out'), which no step has made"),
    "unknown buffer": (changed_step(0, writes=(1, 99)), "writes the unknown buffer 99"),
    "later dependency": (changed_step(1, depends=(3,)), "depends on step 3, which does not come before it"),
    "own dependency": (changed_step(1, depends=(1,)), "depends on step 1, which does not come before it"),
    "unknown dependency": (changed_step(1, depends=(77,)), "depends on the unknown step 77"),
    "started too early": (changed_step(4, start=3.5), "starts at 3.5 s, before step 3"),
    "race of streams": (changed_step(2, depends=()), "reads buffer 2 ('b') without waiting for step 1"),
    "two at once on a stream": (changed_step(1, start=0.5), "starts at 0.5 s on stream 'compute', before step 0 there"),
    "shorter than its steps": (
        replace(sound_plan(), seconds=4.0),
        "the plan claims 4.0 s; its last step ends at 5.0 s",
    ),
    "longer than its steps": (replace(sound_plan(), seconds=5.5), "the plan claims 5.5 s; its last step ends at 5.0 s"),
    "over budget": (replace(sound_plan(), budget=301), "above the budget of 301"),
    "wrong peak": (
        replace(sound_plan(), peak={"device": 301, "host": 64}),
        "claims a peak of 301 bytes on device; its buffers need 302",
    ),
    "missing peak": (replace(sound_plan(), peak={"device": 302}), "claims a peak of 0 bytes on host"),
    "lied about budget": (
        replace(sound_plan(), budget=200, peak={"device": 200, "host": 64}),
        "need 302 bytes on the device, above the budget",
    ),
    "duplicate buffer": (changed_buffer(1, id=2), "the id is used twice"),
    "duplicate step": (changed_step(1, id=0), "the id is used twice"),
    "negative bytes": (changed_buffer(1, bytes=-1), "bytes is -1"),
    "empty lifetime": (changed_buffer(1, upper=0), "lifetime [0, 0)"),
    "lifetime past the end": (changed_buffer(1, upper=6), "lifetime [0, 6) is not within the plan's 5 steps"),
    "tier": (changed_buffer(0, tier="cloud"), "unknown tier 'cloud'"),
    "role": (changed_buffer(0, role="friend"), "unknown role"),
    "decision": (changed_buffer(0, decision="hope"), "unknown decision"),
    "alignment": (changed_buffer(1, alignment=0), "alignment 0"),
    "shape": (changed_buffer(1, shape=(2, -1)), "negative size"),
    "kind": (changed_step(0, kind="dance"), "unknown kind"),
    "nan": (changed_step(0, seconds=math.nan), "seconds is nan"),
    "negative time": (changed_step(0, start=-1.0), "start is -1.0"),
    "infinite plan": (replace(sound_plan(), seconds=math.inf), "plan.seconds is inf"),
    "negative flop": (changed_step(0, flop=-2), "flop is -2"),
    "peak tier": (replace(sound_plan(), peak={"device": 302, "host": 64, "moon": 1}), "unknown tier 'moon'"),
    "graph range": (
        replace(sound_plan(), graphs=(GraphPlan(name="g", graph_hash="", first_step=3, last_step=9),)),
        "steps 3..9 of 5",
    ),
    "graph order": (
        replace(sound_plan(), graphs=(GraphPlan(name="g", graph_hash="", first_step=3, last_step=1),)),
        "steps 3..1",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named(name: str) -> None:
    plan, message = FAULTS[name]
    assert any(message in line for line in problems(plan)), problems(plan)
    with pytest.raises(PlanError):
        validate(plan)


def test_pools_are_separate_arenas() -> None:
    plan = changed_buffer(2, offset=0, pool="saved")
    # Both arenas are held at positions 1 and 2, beside the 100 bytes of x; at position 4 the saved one is gone.
    plan = replace(plan, arena={"device": 128, "device/saved": 64, "host": 64}, peak={"device": 292, "host": 64})
    assert problems(plan) == []
    assert any("no arena" in line for line in problems(replace(plan, arena={"device": 192, "host": 64})))


def overlap_by_pairs(pieces: Sequence[Piece]) -> bool:
    return any(
        max(p.lower, q.lower) < min(p.upper, q.upper) and max(p.low, q.low) < min(p.high, q.high)
        for i, p in enumerate(pieces)
        for q in pieces[i + 1 :]
    )


rectangles = st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(0, 12), st.integers(0, 5))


@given(st.lists(rectangles, max_size=14))
@settings(max_examples=500, deadline=None)
def test_sweep_finds_overlaps_exactly_where_there_are_some(drawn: list[tuple[int, int, int, int]]) -> None:
    pieces = [Piece(t, t + dt, a, a + da, str(i)) for i, (t, dt, a, da) in enumerate(drawn)]
    assert bool(overlaps(pieces)) == overlap_by_pairs(pieces)


def large_plan(size: int) -> Plan:
    """As many placed buffers and steps as ``size``, at addresses of their own."""
    generator = fresh_random()
    buffers, offset = [], 0
    for identity in range(size):
        lower = generator.randrange(size - 1)
        upper = min(size, lower + generator.choice((1, 5, 100, size // 3)))
        length = generator.randrange(1, 5000)
        buffers.append(
            Buffer(id=identity, name="b", bytes=length, lower=lower, upper=upper, role="input", offset=offset)
        )
        offset += -(-length // 64) * 64
    return Plan(
        model="m",
        device="cpu",
        training=True,
        graphs=(),
        steps=tuple(Step(id=i, kind="region", name="s", phase="forward") for i in range(size)),
        buffers=tuple(buffers),
        seconds=0.0,
        peak={"device": offset},
        arena={"device": offset},
    )


def test_work_grows_with_the_plans_size() -> None:
    """O(n log n): eight times the buffers and steps are less than twelve times the work."""
    small, large = large_plan(1000), large_plan(8000)
    assert problems(small) == problems(large) == []
    assert calls_made(lambda: problems(large)) < 12 * calls_made(lambda: problems(small))


def test_one_overlap_among_thousands_is_found() -> None:
    plan = large_plan(8000)
    last = replace(plan.buffers[-1], offset=plan.buffers[100].offset, lower=0, upper=len(plan.steps))
    assert any("overlap" in line for line in problems(replace(plan, buffers=(*plan.buffers[:-1], last))))


def row(name: str, lower: int, upper: int, size: int, offset: int, **more: str) -> dict[str, str]:
    return {"id": name, "lower": str(lower), "upper": str(upper), "size": str(size), "offset": str(offset), **more}


def test_mapping() -> None:
    good = [
        row("b1", 0, 3, 4, 8),
        row("b2", 3, 9, 4, 8),
        row("b3", 0, 9, 4, 4),
        row("b4", 9, 21, 4, 4),
        row("b5", 0, 21, 4, 0),
    ]
    validate_mapping(good, 12)
    for bad, message in [
        ([*good[:1], row("b2", 2, 9, 4, 8), *good[2:]], "'b1' and 'b2' overlap at time 2"),
        ([*good[:4], row("b5", 0, 21, 4, 12)], "ends at 16, above the capacity of 12"),
        ([*good[:4], row("b4", 0, 21, 4, 0)], "line 6: id 'b4' is used twice"),
        ([*good[:4], row("b5", 0, 21, 4, 0) | {"offset": ""}], "line 6"),
        ([row("a", 0, 3, 4, 6, alignment="4")], "offset 6 with alignment 4"),
        ([row("a", 0, 3, 4, -4)], "offset -4"),
        ([row("a", 0, 9, 4, 0, gaps="3-7@0:9")], "gap out of range"),
    ]:
        with pytest.raises(PlanError) as caught:
            validate_mapping(bad, 12)
        assert message in str(caught.value)


def test_mapping_with_gaps() -> None:
    inside = row("b", 3, 7, 10, 0)
    validate_mapping([row("a", 0, 10, 10, 0, gaps="3-7"), inside], 10)
    validate_mapping([row("a", 0, 10, 10, 0, gaps="3-5 5-7"), inside], 10)
    validate_mapping([row("a", 0, 10, 12, 0, gaps="3-7@10:12"), inside], 12)
    with pytest.raises(PlanError, match="overlap at time 3"):
        validate_mapping([row("a", 0, 10, 10, 0, gaps="4-7"), inside])
    with pytest.raises(PlanError, match="overlap at time"):
        validate_mapping([row("a", 0, 10, 12, 0, gaps="3-7@9:12"), inside])
