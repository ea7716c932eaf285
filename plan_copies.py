"""Copies to and from the host in a plan: on streams of their own, at the rate of the device's link."""

from __future__ import annotations

import msgspec

from .cost_model.devices import Device
from .cost_model.simulator import simulate
from .ir.plan import Plan, Step

#: Op of a step -> (kind, stream).
COPIES = {"swap_out": ("swap_out", "copy out"), "swap_in": ("swap_in", "copy in")}


def with_copies(plan: Plan, device: Device) -> Plan:
    """The plan with the steps that swap values as copies. A copy out begins when its value is made, and runs beside the
    forward; a copy in begins after the step before it, and the step that reads its value waits for it."""
    if not any(step.name in COPIES for step in plan.steps):
        return plan
    tier = device.tiers.get("disk" if device.kind == "cpu" else "host")
    bytes_of = {buffer.id: buffer.bytes for buffer in plan.buffers}
    # What leaves is what comes back: of a value that is split by tokens, a part.
    back = [step for step in plan.steps if step.name == "swap_in" and step.writes]
    moved_by = {handle: max(bytes_of[b] for b in step.writes) for step in back for handle in step.reads}
    steps: list[Step] = []
    copied: dict[int, int] = {}
    compute = -1
    for step in plan.steps:
        depends = {copied[buffer] for buffer in step.reads if buffer in copied}
        if step.name in COPIES:
            kind, stream = COPIES[step.name]
            touched = (*step.reads, *step.writes)
            whole = max((bytes_of.get(b, 0) for b in touched), default=0)
            moved = next((moved_by[b] for b in step.writes if b in moved_by), whole)
            seconds = tier.latency.value + moved / tier.bandwidth.value if tier is not None else step.seconds
            if device.kind == "cpu":  # the process itself copies
                stream = "compute"
            if compute >= 0:
                depends.add(compute)
            step = msgspec.structs.replace(step, kind=kind, stream=stream, seconds=seconds, bytes_moved=moved, flop=0)
            copied.update(dict.fromkeys(step.writes, step.id))
        else:
            compute = step.id
        steps.append(msgspec.structs.replace(step, depends=tuple(sorted({*step.depends, *depends}))))
    timeline = simulate(steps)
    steps = [msgspec.structs.replace(step, start=start) for step, start in zip(steps, timeline.start, strict=True)]
    return msgspec.structs.replace(plan, steps=tuple(steps), seconds=timeline.makespan)
