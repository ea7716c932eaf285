"""What a plan says, as figures and as words: use of memory over time, who holds the peak, where the time goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import msgspec

from .cost_model.devices import Device, load_device
from .cost_model.gemm_measurement import LIBRARIES
from .errors import DeviceError
from .formatting import bytes_text, count_text, seconds_text
from .ir.plan import Buffer, Plan, Step

#: What a step that is not kernel work waits for.
COPIES = ("swap_out", "swap_in")


@dataclass(frozen=True)
class Holder:
    """Buffers that are held at the peak for one reason: same role, module class and source line."""

    role: str
    what: str
    place: str
    bytes: int
    count: int
    decision: str
    #: Id of the first of the buffers.
    first: int = -1


@dataclass(frozen=True)
class StepGroup:
    """Steps that do the same work: one region or op, in one phase, however often it repeats."""

    name: str
    kind: str
    phase: str
    stream: str
    count: int
    seconds: float
    flop: int
    bytes_moved: int
    bound: str
    place: str
    #: Position of the first of the steps.
    first: int = 0


@dataclass(frozen=True)
class Summary:
    """The plan in figures. Sizes are bytes, times seconds; ``capacity`` is the device's memory, None if not known."""

    model: str
    device: str
    training: bool
    seconds: float
    peak: int
    budget: int | None
    capacity: int | None
    fits: bool | None
    peak_position: int
    roles: dict[str, int]
    holders: tuple[Holder, ...]
    groups: tuple[StepGroup, ...]
    bounds: dict[str, float]
    flop: int
    bytes_moved: int
    steps: int
    distinct: int
    fallbacks: int
    words: tuple[str, ...] = field(default=())


def device_named(name: str, gemm: str = "measure") -> Device:
    """The device of that name or file; ``cpu`` is this machine's as measured by ``effcc calibrate``, if it was.
    ``gemm`` is the option: its products take what the library takes that it fixes.

    Raises DeviceError for an unknown one.
    """
    if name.lower() != "cpu":
        return load_device(name)
    from .cost_model.calibrate import calibrated_device

    device = calibrated_device()
    return msgspec.structs.replace(device, library=gemm) if gemm in LIBRARIES else device


def device_of(plan: Plan) -> Device | None:
    """The device the plan was made for; None when its file is not on this machine."""
    try:
        return device_named(plan.device)
    except DeviceError:
        return None


def memory_use(plan: Plan, tier: str = "device") -> list[int]:
    """Bytes in use at each position, as ``ir.plan`` defines it: arenas are held in full, the rest while it is live."""
    ends = max((buffer.upper for buffer in plan.buffers), default=0)
    change = [0] * (max(ends, len(plan.steps)) + 1)
    arenas: dict[str, tuple[int, int]] = {}
    for buffer in plan.buffers:
        if buffer.tier != tier or buffer.upper <= buffer.lower:
            continue
        if buffer.offset is None:
            change[buffer.lower] += buffer.bytes
            change[buffer.upper] -= buffer.bytes
        else:
            lower, upper = arenas.get(buffer.arena_key, (buffer.lower, buffer.upper))
            arenas[buffer.arena_key] = (min(lower, buffer.lower), max(upper, buffer.upper))
    for key, (lower, upper) in arenas.items():
        size = plan.arena.get(key, 0)
        change[lower] += size
        change[upper] -= size
    use, running = [], 0
    for delta in change[:-1]:
        running += delta
        use.append(running)
    return use


def live_use(plan: Plan, tier: str = "device") -> list[int]:
    """Bytes of live buffers at each position, without the gaps between them in an arena."""
    ends = max((buffer.upper for buffer in plan.buffers), default=0)
    change = [0] * (max(ends, len(plan.steps)) + 1)
    for buffer in plan.buffers:
        if buffer.tier == tier and buffer.upper > buffer.lower:
            change[buffer.lower] += buffer.bytes
            change[buffer.upper] -= buffer.bytes
    use, running = [], 0
    for delta in change[:-1]:
        running += delta
        use.append(running)
    return use


def live_at(plan: Plan, position: int, tier: str = "device") -> list[Buffer]:
    return [b for b in plan.buffers if b.tier == tier and b.lower <= position < b.upper]


def peak_position(plan: Plan) -> int:
    """The first position where the most bytes are live."""
    use = live_use(plan)
    return use.index(max(use)) if use else 0


def module_class(module: str) -> str:
    """The module path with the numbers of repeated layers replaced: ``layers.3.mlp`` -> ``layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def holders(buffers: Iterable[Buffer]) -> tuple[Holder, ...]:
    """The buffers in groups, largest first. Layers that repeat fall into one group."""
    groups: dict[tuple[str, str, str, str], list[Buffer]] = {}
    for buffer in buffers:
        module = module_class(buffer.module)
        held_all_along = buffer.role in ("parameter", "gradient", "optimizer", "buffer")
        # A module path of numbers alone (of a Sequential) says nothing.
        named = module if module.strip("*.") else ""
        what = (named or buffer.name) if held_all_along else (buffer.source or named or buffer.name)
        key = (buffer.role, what, named, buffer.decision)
        groups.setdefault(key, []).append(buffer)
    found = [
        Holder(role, what, module, sum(b.bytes for b in members), len(members), decision, members[0].id)
        for (role, what, module, decision), members in groups.items()
    ]
    return tuple(sorted(found, key=lambda holder: (-holder.bytes, holder.role, holder.what)))


def step_bound(step: Step, device: Device | None, dtype: str) -> str:
    """What a step's time is spent on: compute, memory, launch, copy or network."""
    if step.kind in COPIES:
        return "copy"
    if step.kind == "collective":
        return "network"
    if device is None:
        return "unknown"
    compute = step.flop / device.matrix_rate(dtype or "f32")
    memory = step.bytes_moved / device.bandwidth
    if device.launch.value > compute + memory:
        return "launch"
    return "compute" if compute >= memory else "memory"


def step_groups(plan: Plan, device: Device | None) -> tuple[StepGroup, ...]:
    """Steps folded where they run the same ops of the same region in the same phase, longest first."""
    groups: dict[tuple[str, ...], list[Step]] = {}
    begins: dict[tuple[str, ...], int] = {}
    for position, step in enumerate(plan.steps):
        if step.kind != "free":
            key = (step.name, step.kind, step.phase, step.stream, *_work(step))
            groups.setdefault(key, []).append(step)
            begins.setdefault(key, position)
    found = []
    for key, members in groups.items():
        name, kind, phase, stream, *_ = key
        flop, moved = sum(s.flop for s in members), sum(s.bytes_moved for s in members)
        spent: dict[str, float] = {}
        for step in members:
            bound = step_bound(step, device, plan.dtype)
            spent[bound] = spent.get(bound, 0.0) + step.seconds
        modules = list(dict.fromkeys(module_class(step.module) for step in members if step.module))
        sources = list(dict.fromkeys(step.source for step in members if step.source))
        place = " in ".join(part for part in (sources[0] if sources else "", modules[0] if modules else "") if part)
        seconds = sum(step.seconds for step in members)
        bound = max(spent, key=lambda each: spent[each])
        count = len(members)
        found.append(StepGroup(name, kind, phase, stream, count, seconds, flop, moved, bound, place, begins[key]))
    return tuple(sorted(found, key=lambda group: -group.seconds))


def _work(step: Step) -> tuple[str, ...]:
    """What tells steps of one name apart: region, ops and size. Copies of a layer have all of them in common."""
    return step.region, *step.ops, str(step.flop), str(step.bytes_moved)


def summarize(plan: Plan) -> Summary:
    """Figures and words for a plan."""
    device = device_of(plan)
    position = peak_position(plan)
    live = live_at(plan, position)
    roles: dict[str, int] = {}
    for buffer in sorted(live, key=lambda b: -b.bytes):
        roles[buffer.role] = roles.get(buffer.role, 0) + buffer.bytes
    peak = plan.peak.get("device", 0)
    gaps = peak - sum(roles.values())
    if gaps > 0:
        roles["unused gaps"] = gaps
    bounds: dict[str, float] = {}
    for step in plan.steps:
        if step.kind != "free":
            bound = step_bound(step, device, plan.dtype)
            bounds[bound] = bounds.get(bound, 0.0) + step.seconds
    capacity = device.memory if device else None
    limit = min((size for size in (plan.budget, capacity) if size is not None), default=None)
    distinct = len({(step.name, step.phase, *_work(step)) for step in plan.steps if step.kind != "free"})
    summary = Summary(
        model=plan.model,
        device=plan.device,
        training=plan.training,
        seconds=plan.seconds,
        peak=peak,
        budget=plan.budget,
        capacity=capacity,
        fits=None if limit is None else peak <= limit,
        peak_position=position,
        roles=dict(sorted(roles.items(), key=lambda item: -item[1])),
        holders=holders(live),
        groups=step_groups(plan, device),
        bounds=dict(sorted(bounds.items(), key=lambda item: -item[1])),
        flop=sum(step.flop for step in plan.steps),
        bytes_moved=sum(step.bytes_moved for step in plan.steps),
        steps=sum(step.kind != "free" for step in plan.steps),
        distinct=distinct,
        fallbacks=len(plan.fallbacks),
    )
    return replace(summary, words=tuple(_words(summary, plan)))


def _words(summary: Summary, plan: Plan) -> Iterable[str]:
    what = "one training step" if summary.training else "one forward pass"
    peak = bytes_text(summary.peak)
    if summary.capacity is None:
        yield f"{what.capitalize()} needs {peak}; the memory of {summary.device} is not known here."
    else:
        verdict = "fits" if summary.peak <= summary.capacity else "does not fit"
        share = 100 * summary.peak / summary.capacity
        capacity = bytes_text(summary.capacity)
        yield f"{what.capitalize()} {verdict} on {summary.device}: {peak} of {capacity} at the peak ({share:.0f} %)."
    if summary.budget is not None:
        kept = "kept" if summary.peak <= summary.budget else "NOT kept"
        yield f"The memory budget of {bytes_text(summary.budget)} is {kept}."
    if summary.roles:
        total = sum(summary.roles.values()) or 1
        parts = [
            f"{role} {bytes_text(size)} ({100 * size / total:.0f} %)" for role, size in list(summary.roles.items())[:4]
        ]
        where = plan.steps[summary.peak_position] if summary.peak_position < len(plan.steps) else None
        moment = f" during the {where.phase} step {where.name}" if where else ""
        yield f"The peak is held{moment} by {', '.join(parts)}."
    if summary.seconds > 0:
        line = f"Predicted time {seconds_text(summary.seconds)}: {count_text(summary.flop, 'FLOP')}"
        line += f" and {bytes_text(summary.bytes_moved)} moved"
        total_time = sum(summary.bounds.values())
        if total_time > 0:
            shares = [f"{100 * spent / total_time:.0f} % {bound}" for bound, spent in list(summary.bounds.items())[:3]]
            line += f"; bound by {', '.join(shares)}"
        yield line + "."
    yield f"{summary.steps} steps, {summary.distinct} of them distinct."
    if summary.fallbacks:
        yield f"{summary.fallbacks} ops do not run the planned way (see the fallbacks)."
