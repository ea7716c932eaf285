"""Kernels beside each other in plans for GPUs: valid plans, never slower, never larger."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from command_line import Effcc
from effcc.cost_model.devices import load_device
from effcc.errors import OptionError
from effcc.ir.plan import Buffer, Plan, Step
from effcc.ir.plan_validator import validate
from effcc.plan_request import PlanRequest, check_options
from effcc.plan_streams import at_once, with_streams
from fresh_seed import fresh_random

H100 = load_device("h100")


def branches(width: int, bytes_each: int = 1 << 16) -> Plan:
    """x -> ``width`` kernels that only read x -> one that reads all of theirs."""
    launch = H100.launch.value
    seconds = launch + 2e-6
    results = tuple(range(1, width + 1))
    steps = [
        Step(id=i, kind="kernel", name=f"k{i}", phase="inference", reads=(0,), writes=(i + 1,), start=i * seconds,
             seconds=seconds, bytes_moved=2 * bytes_each)
        for i in range(width)
    ]  # fmt: skip
    steps.append(
        Step(id=width, kind="kernel", name="sum", phase="inference", reads=results, writes=(width + 1,),
             frees=results, start=width * seconds, seconds=seconds, bytes_moved=bytes_each)
    )  # fmt: skip
    count = width + 1
    buffers = [Buffer(id=0, name="x", bytes=bytes_each, lower=0, upper=count, role="input")]
    buffers += [Buffer(id=i, name=f"y{i}", bytes=bytes_each, lower=i - 1, upper=count, role="scratch") for i in results]
    buffers.append(Buffer(id=width + 1, name="z", bytes=bytes_each, lower=width, upper=count, role="output"))
    peak = {"device": bytes_each * (width + 2)}
    return Plan(
        model="branches", device="h100", training=False, graphs=(), steps=tuple(steps), buffers=tuple(buffers),
        seconds=count * seconds, peak=peak, arena={}, dtype="f32",
    )  # fmt: skip


def test_small_kernels_that_need_nothing_of_each_other_run_at_once() -> None:
    plan = branches(3)
    validate(plan)
    made = with_streams(plan, H100, 4)
    validate(made)
    assert [step.stream for step in made.steps] == ["compute", "compute 2", "compute 3", "compute"]
    assert made.seconds == pytest.approx(at_once(plan.steps[:3], H100, "f32") + plan.steps[3].seconds)
    assert made.seconds < plan.seconds
    (decision,) = made.decisions
    assert decision.kind == "order and streams"
    # No order and no number of streams is faster than a branch and the step that waits for it.
    assert decision.bound == pytest.approx(plan.steps[0].seconds + plan.steps[3].seconds)
    assert with_streams(plan, H100, 1) is plan
    assert with_streams(plan, load_device("cpu"), 4) is plan


def test_large_kernels_stay_one_after_the_other() -> None:
    plan = branches(2)
    busy = [
        msgspec.structs.replace(step, bytes_moved=int(step.seconds * H100.bandwidth), start=step.start)
        for step in plan.steps
    ]
    assert with_streams(msgspec.structs.replace(plan, steps=tuple(busy)), H100, 4).seconds == plan.seconds


def test_what_would_be_held_together_stays_within_the_peak() -> None:
    """Each of two kernels makes a large value that is read at once: they fit one after the other only."""
    plan = branches(2)
    first, second, last = plan.steps
    big = 1 << 20
    x, y1, y2, z = plan.buffers
    steps = (
        msgspec.structs.replace(first, frees=(1,)),
        second,
        msgspec.structs.replace(last, reads=(2,), frees=(2,)),
    )
    buffers = (
        x,
        msgspec.structs.replace(y1, bytes=big, upper=1),
        msgspec.structs.replace(y2, bytes=big),
        z,
    )
    tight = msgspec.structs.replace(plan, steps=steps, buffers=buffers, peak={"device": big + 2 * x.bytes})
    validate(tight)
    assert with_streams(tight, H100, 4).seconds == tight.seconds
    roomy = msgspec.structs.replace(buffers[3], bytes=big + x.bytes)
    loose = msgspec.structs.replace(tight, buffers=(*buffers[:3], roomy), peak={"device": 2 * big + 2 * x.bytes})
    validate(loose)
    made = with_streams(loose, H100, 4)
    validate(made)
    assert made.seconds < loose.seconds
    assert made.peak["device"] <= loose.peak["device"]


def test_a_later_step_is_brought_forward_to_run_beside_an_earlier_one() -> None:
    """x -> a -> b, and x -> c, which stands last: a and c run at once, b after them."""
    plan = branches(3)
    a, b, c, last = plan.steps
    b = msgspec.structs.replace(b, reads=(1,))
    chained = msgspec.structs.replace(plan, steps=(a, b, c, last))
    validate(chained)
    made = with_streams(chained, H100, 2)
    validate(made)
    assert [(step.name, step.stream) for step in made.steps] == [
        ("k0", "compute"), ("k2", "compute 2"), ("k1", "compute"), ("sum", "compute")
    ]  # fmt: skip
    assert made.seconds == pytest.approx(plan.seconds - a.seconds - c.seconds + at_once((a, c), H100, "f32"))
    (decision,) = made.decisions
    assert "1 with steps that were brought forward" in decision.subject
    assert decision.bound is not None and decision.bound <= made.seconds
    assert with_streams(msgspec.structs.replace(chained, steps=(a, b, msgspec.structs.replace(c, reads=(2,)), last)),
                        H100, 2).seconds == plan.seconds  # fmt: skip


def test_random_plans_stay_valid() -> None:
    rng = fresh_random()
    for _ in range(30):
        count = rng.randint(4, 14)
        steps, users = [], {0: 0}
        start = 0.0
        for i in range(count):
            reads = tuple(sorted(rng.sample(range(i + 1), rng.randint(1, min(3, i + 1)))))
            users.update(dict.fromkeys(reads, i))
            users[i + 1] = i
            seconds = H100.launch.value + rng.random() * 1e-5
            moved = int(rng.random() * 1e-5 * H100.bandwidth)
            steps.append(Step(id=i, kind="kernel", name=f"k{i}", phase="inference", reads=reads, writes=(i + 1,),
                              start=start, seconds=seconds, bytes_moved=moved))  # fmt: skip
            start += seconds
        freed = {b: at for b, at in users.items() if 0 < b < count}
        steps = [
            msgspec.structs.replace(step, frees=tuple(b for b, at in freed.items() if at == step.id)) for step in steps
        ]
        roles = ["input", *("scratch" if b in freed else "output" for b in range(1, count + 1))]
        buffers = tuple(
            Buffer(
                id=b,
                name=f"b{b}",
                bytes=rng.randint(1, 99) << 10,
                lower=max(0, b - 1),
                upper=freed[b] + 1 if b in freed else count,
                role=role,
            )
            for b, role in enumerate(roles)
        )
        live = [sum(b.bytes for b in buffers if b.lower <= at < b.upper) for at in range(count)]
        plan = Plan(model="random", device="h100", training=False, graphs=(), steps=tuple(steps), buffers=buffers,
                    seconds=start, peak={"device": max(live)}, arena={}, dtype="f32")  # fmt: skip
        validate(plan)
        made = with_streams(plan, H100, rng.randint(2, 5))
        validate(made)
        assert made.seconds <= plan.seconds * (1 + 1e-9)
        assert made.peak["device"] <= plan.peak["device"]


def test_a_number_of_streams_that_no_plan_has_is_refused() -> None:
    with pytest.raises(OptionError, match="streams"):
        check_options(PlanRequest(model="m.py", streams=0))


BRANCHES = """
import torch

class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        return sum(torch.relu(part(x)) for part in self.parts)

model = Branches
example_inputs = (torch.randn(32, 64),)
"""


def test_a_plan_with_streams_is_explained(effcc: Effcc, tmp_path: Path) -> None:
    source, plan = tmp_path / "branches.py", tmp_path / "branches.plan"
    source.write_text(BRANCHES)
    one = effcc("plan", source, "--device", "h100", "--no-report", "-o", plan, "--json").json
    several = effcc("plan", source, "--device", "h100", "--streams", "3", "--no-report", "-o", plan, "--json").json
    assert several["summary"]["seconds"] < one["summary"]["seconds"]
    shown = effcc("explain", plan, "--schedule", "--json").json["schedule"]
    assert {"compute", "compute 2"} <= {each["stream"] for each in shown["streams"]}
    (decision,) = [each for each in shown["decisions"] if each["kind"] == "order and streams"]
    assert decision["chosen"] == "at once where faster"
    assert decision["gap"] is not None
    assert "sum of x[w] over the ways of one choice = 1" in effcc("explain", plan, "--schedule").out
    assert effcc("plan", source, "--device", "h100", "--streams", "0", "-o", plan).code == 2
