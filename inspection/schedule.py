"""The schedule of a plan as a model with its answer: what was decided, among what, and how far from a bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..cost_model.kernel_order import size_of_model
from ..cost_model.step_bounds import MOST_STEPS, StepBounds, needs, order_problem, step_bounds
from ..formatting import bytes_text, seconds_text
from ..ir.plan import Decision, Plan

#: The model that kernels, variants and streams are chosen by, as ``cost_model.schedule_model`` states it.
CHOICES = (
    "x[w] in {0,1}: way w is taken; choices that are alike (equal layers) share them",
    "minimize sum of seconds[w] x[w]",
    "sum of x[w] over the ways of one choice = 1         as written, one kernel, in chunks, beside others",
    "sum of x[w] over the ways that take one op <= 1     where kernels begin and end",
    "x[not made] + x[w] = 1 for a kernel's variants      tiles, parts, one or two: chosen where way w makes the kernel",
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


#: Kinds of decisions that it makes.
CHOSEN = ("fusion", "kernel", "candidates", "streams")


def figures(plan: Plan) -> dict[str, Any]:
    """The same as data: seconds, bytes, shares."""
    bounds = step_bounds(plan)
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
    """What was recorded, and what the solvers decided of activations and offsets."""
    found = list(plan.decisions)
    for solver in plan.solvers:
        found.append(
            Decision(
                kind=solver.problem.partition(":")[0],
                subject=solver.problem.partition(":")[2].strip() or "the step",
                chosen=solver.name,
                alternatives=(),
                unit="seconds" if "seconds" in solver.problem else "bytes",
                bound=solver.bound,
            )
        )
    return found


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
    """The answer in sentences."""
    why = "the longest chain of steps" if bounds.longest_chain >= bounds.busiest else "the busiest stream"
    yield (
        f"Time: {seconds_text(bounds.seconds)} predicted; no schedule of these steps takes less than "
        f"{seconds_text(bounds.bound)} ({why}), a gap of {100 * bounds.gap:.2f} %."
    )
    if bounds.peak_bound is not None:
        gap = (bounds.peak - bounds.peak_bound) / bounds.peak if bounds.peak else 0.0
        yield (
            f"Memory: {bytes_text(bounds.peak)} live at most; no order of these steps needs less than "
            f"{bytes_text(bounds.peak_bound)}, a gap of {100 * gap:.2f} %."
        )
    size = model_size(plan)
    if "variables" in size:
        yield (
            f"The order as a model: {size['kernels']} kernels and {size['values']} values, {size['variables']:,} "
            f"variables and {size['constraints']:,} constraints, solved in windows around the peak:"
        )
    else:
        yield f"The order as a model, for {size['kernels']} kernels and {size['values']} values:"
    yield from (f"    {line}" for line in MODEL)
    chosen = [each for each in plan.decisions if each.kind in CHOSEN]
    if chosen:
        ways = sum(len(each.alternatives) for each in chosen)
        yield f"What runs as a model, for {len(chosen)} choices of {ways} ways:"
        yield from (f"    {line}" for line in CHOICES)


def value_text(value: float, unit: str) -> str:
    return bytes_text(int(value)) if unit == "bytes" else seconds_text(value)
