"""The schedule of a plan as models with their answers: what was decided, among what, in which sequence, and how far the
answers are from bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..cost_model.kernel_order import size_of_model
from ..cost_model.step_bounds import MOST_STEPS, StepBounds, needs, order_problem, step_bounds
from ..formatting import bytes_text, seconds_text
from ..ir.plan import Alternative, Decision, Plan

#: The model that kernels, variants and streams are chosen by, as ``cost_model.schedule_model`` states it.
CHOICES = (
    "x[w] in {0,1}: way w is taken; choices that are alike (equal layers) share them",
    "minimize sum of seconds[w] x[w]",
    "sum of x[w] over the ways of one choice = 1         as written, one kernel, in chunks, beside others",
    "sum of x[w] over the ways that take one op <= 1     where kernels begin and end",
    "x[not made] + x[w] = 1 for a kernel's variants      tiles, parts, warps: chosen where way w makes the kernel",
    "no ways that wait for each other in a circle",
    "held[t] + sum of bytes[w] x[w] held at t <= peak <= limit",
)
#: The model that orders are chosen by, as ``cost_model.kernel_order`` states it.
MODEL = (
    "done[i,t] in {0,1}: kernel i runs at position t or before; freed[v,t] in {0,1}: value v is not held after t",
    "minimize peak",
    "sum_i done[i,t] = t + 1                     one kernel at a time",
    "done[j,t] <= done[i,t-1]                    where i must run before j",
    "freed[v,t] <= done[u,t]                     where u makes or reads v; what stays is not freed",
    "sum_v bytes[v] (done[maker(v),t] - freed[v,t-1]) <= peak",
)


@dataclass(frozen=True)
class Stage:
    """What one model decides at once: kinds of decisions; ``what`` for people, ``how`` it is solved."""

    what: str
    how: str
    kinds: tuple[str, ...]


#: In the sequence in which they are decided.
STAGES = (
    Stage(
        "what is fused into one kernel, and each kernel's tiles, parts, warps", "CP-SAT",
        ("fusion", "kernel", "candidates"),
    ),
    Stage("what is kept, recomputed or swapped", "minimum cuts, mixed-integer program, simulator", ("activations",)),
    Stage("the order of each region's kernels", "CP-SAT in windows around the peak", ("kernel order",)),
    Stage("which steps run at once, and so their order", "CP-SAT", ("order and streams",)),
    Stage("addresses", "best fit, branch and bound, CP-SAT", ("memory_mapping",)),
)  # fmt: skip
#: Kinds of decisions that the model of ways makes.
CHOSEN = (*STAGES[0].kinds, *STAGES[3].kinds)
#: What the kinds of decisions are, and how to read their rows.
LEGEND = {
    "fusion": "reductions that depend on each other, named by their largest tensor and its place in the source; what "
    "is fused for memory may be slower, and no choice that saves as much takes fewer seconds than the bound",
    "kernel": "tile lengths of each launch by rank (letters are the kernel's own); 'of N': parts of N coordinates that "
    "run at once and are merged; (rule): what the generator's rules make",
    "candidates": "the graph with its kernels and as written, run and timed where predictions are too close",
    "activations": "what a forward leaves for its backward",
    "kernel order": "of the kernels of one compiled region, by the bytes held at once",
    "order and streams": "steps that are launched on several streams at once, a later one brought forward if need be",
    "memory_mapping": "offsets in arenas; the bound is the most that is live at once",
}
#: Alternatives of a decision that are printed; ``--json`` has all.
SHOWN = 2
#: Orders nearer to their bounds than this are printed as one row.
AT_BOUND = 0.001


def figures(plan: Plan) -> dict[str, Any]:
    """The same as data: seconds, bytes, shares."""
    bounds = step_bounds(plan)
    least = together_bound(plan)
    return {
        "seconds": bounds.seconds,
        "bound": bounds.bound,
        "gap": bounds.gap,
        "longest_chain": bounds.longest_chain,
        "busiest_stream": bounds.busiest,
        "peak": bounds.peak,
        "peak_bound": bounds.peak_bound,
        "streams": [
            {"device": s.device, "stream": s.stream, "steps": s.steps, "busy": s.busy, "alone": s.alone}
            for s in bounds.streams
        ],
        "model": model_size(plan),
        "sequence": [
            {"what": stage.what, "how": stage.how, "decisions": len(mine)} for stage, mine in sequence(plan)
        ],
        "together_bound": least,
        "sequence_loss": max(0.0, 1 - least / plan.seconds) if plan.seconds else 0.0,
        "decisions": [
            {
                "kind": each.kind,
                "subject": each.subject,
                "chosen": each.chosen,
                "unit": each.unit,
                "bound": each.bound,
                "gap": gap_of(each),
                "alternatives": [
                    {"what": a.what, "value": a.value, "measured": a.measured} for a in each.alternatives
                ],
            }
            for each in decisions(plan)
        ],
    }  # fmt: skip


def decisions(plan: Plan) -> list[Decision]:
    """What was recorded, and what the solvers decided of offsets."""
    found = list(plan.decisions)
    known = {each.kind for each in found}
    for solver in plan.solvers:
        name, _, about = solver.problem.partition(":")
        kind, _, where = name.partition("[")
        if kind in known:
            continue
        found.append(
            Decision(
                kind=kind,
                subject=about.strip() or where.rstrip("]") or "the step",
                chosen=solver.name,
                alternatives=(Alternative(what=solver.name, value=solver.value),),
                unit="seconds" if "seconds" in solver.problem else "bytes",
                bound=solver.bound,
            )
        )
    return found


def sequence(plan: Plan) -> list[tuple[Stage, list[Decision]]]:
    """The stages in which something was decided, with what."""
    found = decisions(plan)
    listed = [(stage, [each for each in found if each.kind in stage.kinds]) for stage in STAGES]
    return [(stage, mine) for stage, mine in listed if mine]


def together_bound(plan: Plan) -> float:
    """Seconds that the step would take at least, were all of it decided at once: every choice of what is fused and of
    streams at its bound, and activations as they are without a limit. Order and addresses take no time."""
    lost = 0.0
    for each in plan.decisions:
        value = taken(each)
        if each.unit != "seconds" or value is None:
            continue
        if each.kind == "activations":
            lost += value - min(way.value for way in each.alternatives)
        elif each.bound is not None and each.kind in ("fusion", "order and streams"):
            lost += max(0.0, value - each.bound)
    return max(0.0, plan.seconds - lost)


def model_size(plan: Plan) -> dict[str, int]:
    """Variables and constraints of the order of all steps of the plan, as one model."""
    if len(plan.steps) > MOST_STEPS:
        return {"kernels": len(plan.steps), "values": len(plan.buffers)}
    return size_of_model(order_problem(plan, needs(plan.steps)))


def taken(decision: Decision) -> float | None:
    """The value of what was chosen, None where alternatives were not recorded."""
    return next((each.value for each in decision.alternatives if each.what == decision.chosen), None)


def gap_of(decision: Decision) -> float | None:
    value = taken(decision)
    if value is None or decision.bound is None or not value:
        return None
    return max(0.0, (value - decision.bound) / value)


def words(plan: Plan, bounds: StepBounds) -> Iterator[str]:
    """The answer in sentences, and the models."""
    streams = sum(load.device == 0 and load.stream.startswith("compute") for load in bounds.streams)
    if len(bounds.streams) <= 1:
        yield (
            f"Time: {seconds_text(bounds.seconds)} predicted, one step after the other. The longest chain of steps "
            f"that wait for each other takes {seconds_text(bounds.longest_chain)}: on several streams, no order takes "
            "less."
        )
    else:
        copies = f" and {len(bounds.streams) - streams} of copies" if len(bounds.streams) > streams else ""
        why = "the longest chain of steps" if bounds.longest_chain >= bounds.busiest else "the busiest stream"
        yield (
            f"Time: {seconds_text(bounds.seconds)} predicted on {_count(streams, 'stream')} of kernels"
            f"{copies}; in this order and on these streams, the steps take "
            f"{seconds_text(bounds.bound)} at least ({why}), a gap of {100 * bounds.gap:.2f} %."
        )
    if bounds.peak_bound is not None:
        gap = (bounds.peak - bounds.peak_bound) / bounds.peak if bounds.peak else 0.0
        yield (
            f"Memory: {bytes_text(bounds.peak)} live at most; no order of these steps needs less than "
            f"{bytes_text(bounds.peak_bound)}, a gap of {100 * gap:.2f} %."
        )
    yield from _in_sequence(plan)
    yield from _models(plan)


def _in_sequence(plan: Plan) -> Iterator[str]:
    stages = sequence(plan)
    if not stages:
        return
    yield "Decided in this sequence, each line as one model, all by the same predicted times and bytes:"
    for number, (stage, mine) in enumerate(stages, start=1):
        ways = sum(len(each.alternatives) for each in mine)
        yield f"    {number}. {stage.what}: {_count(len(mine), 'choice')} of {_count(ways, 'way')} ({stage.how})"
    least = together_bound(plan)
    loss = max(0.0, 1 - least / plan.seconds) if plan.seconds else 0.0
    kept = "; what is fused for the memory that it saves stays so" if any(map(for_memory, plan.decisions)) else ""
    yield (
        f"    What the sequence costs: at most {100 * loss:.2f} % of the time. Decided all at once, the step would "
        f"take {seconds_text(least)} at least: each choice at its bound, with all the memory that it wants{kept}."
    )


def _models(plan: Plan) -> Iterator[str]:
    kinds = {each.kind for each in plan.decisions}
    if kinds & set(CHOSEN):
        chosen = [each for each in plan.decisions if each.kind in CHOSEN]
        ways = sum(len(each.alternatives) for each in chosen)
        yield f"What runs, as a model, for {_count(len(chosen), 'choice')} of {_count(ways, 'way')}:"
        yield from (f"    {line}" for line in CHOICES)
    if "kernel order" in kinds:
        size = model_size(plan)
        sized = ""
        if "variables" in size:
            sized = (
                f" (for all {size['kernels']} kernels and {size['values']} values of the step at once it would have "
                f"{size['variables']:,} variables and {size['constraints']:,} constraints)"
            )
        yield f"The order as a model, solved for each region in windows around its peak{sized}:"
        yield from (f"    {line}" for line in MODEL)


def rows(found: Sequence[Decision]) -> list[Decision]:
    """Decisions as they are printed: orders that nothing was to be gained by as one."""
    settled = [
        each
        for each in found
        if each.kind == "kernel order"
        and (gap_of(each) or 0.0) <= AT_BOUND
        and taken(each) == max(way.value for way in each.alternatives)
    ]
    if len(settled) < 2:
        return list(found)
    whole = Decision(
        kind="kernel order",
        subject=f"{len(settled)} regions",
        chosen="as they stand, proven to need least",
        alternatives=(),
        unit="bytes",
    )
    return [each for each in found if each not in settled] + [whole]


def others(decision: Decision) -> str:
    """The alternatives that were not taken, the nearest first."""
    value = taken(decision) or 0.0
    left = [each for each in decision.alternatives if each.what != decision.chosen]
    left.sort(key=lambda each: abs(each.value - value))
    told = [f"{a.what} {value_text(a.value, decision.unit)}{' (measured)' if a.measured else ''}" for a in left[:SHOWN]]
    if len(left) > SHOWN:
        most = max(each.value for each in left[SHOWN:])
        told.append(f"and {len(left) - SHOWN} more, up to {value_text(most, decision.unit)}")
    return "; ".join(told)


def for_memory(decision: Decision) -> bool:
    """Whether something is fused although that is slower: for the wide tensors that are then never stored."""
    value = taken(decision)
    least = min((each.value for each in decision.alternatives), default=0.0)
    return decision.kind == "fusion" and value is not None and value > least * 1.001


def chosen_words(decision: Decision) -> str:
    """What was chosen, and why where something else takes less time."""
    value = taken(decision)
    least = min((each.value for each in decision.alternatives), default=0.0)
    if for_memory(decision):
        return f"{decision.chosen} (slower, for the memory that it saves)"
    if decision.kind == "kernel" and value is not None and value > least * 1.001:
        return f"{decision.chosen} (prices this near are not told apart)"
    if any(each.measured and each.what == decision.chosen for each in decision.alternatives):
        return f"{decision.chosen} (measured)"
    return decision.chosen


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def value_text(value: float, unit: str) -> str:
    return bytes_text(int(value)) if unit == "bytes" else seconds_text(value)
