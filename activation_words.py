"""What was chosen for activations, in words and as rows, for messages, reports and plans."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from .formatting import bytes_text, seconds_text
from .ir.plan import Alternative, Decision, Plan, Solver, Step
from .passes.activation.choice import ActivationChoice, Row


def sentence(choice: ActivationChoice) -> str:
    """The choice in one line: what is kept, what it costs, and how far that may be from the best."""
    if choice.rule == "keep":
        return f"Activations: {bytes_text(choice.saved_bytes)} kept, all that torch's minimum cut keeps."
    away = f" and {bytes_text(choice.swapped_bytes)} swapped" if choice.swapped else ""
    line = (
        f"Activations: {bytes_text(choice.saved_bytes)} kept{away} instead of {bytes_text(choice.plain_saved_bytes)}; "
        f"what was not kept takes {seconds_text(max(choice.seconds, 0.0))}, {100 * choice.price:.1f} % of the step"
    )
    if choice.gap is not None:
        line += f" (at most {100 * choice.gap:.2f} % of it could be saved)"
    return line + "."


def rows_in_words(rows: Iterable[Row]) -> list[str]:
    found = []
    for row in rows:
        times = f"{row.count} x " if row.count > 1 else ""
        where = f" in {row.module}" if row.module else ""
        cost = f", {seconds_text(row.seconds)}" if row.seconds else ""
        found.append(f"{row.fate} {times}{row.what}{where}: {bytes_text(row.bytes)}{cost}")
    return found


def choice_figures(choice: ActivationChoice) -> dict[str, Any]:
    """The choice as figures: bytes, seconds, shares of the step."""
    return {
        "rule": choice.rule,
        "saved_bytes": choice.saved_bytes,
        "swapped_bytes": choice.swapped_bytes,
        "plain_saved_bytes": choice.plain_saved_bytes,
        "seconds": choice.seconds,
        "price": choice.price,
        "gap": choice.gap,
        "floor_bound": choice.floor_bound,
        "rows": [dataclasses.asdict(row) for row in choice.rows],
    }


def with_choices(plan: Plan, choices: Sequence[ActivationChoice]) -> Plan:
    """The plan with notes on what was chosen, and how it was decided."""
    planned = [choice for choice in choices if choice.rule != "keep"]
    if not planned:
        return plan
    notes: list[str] = []
    solvers: list[Solver] = []
    decisions = [_decision(choice) for choice in planned]
    for choice in planned:
        notes.append(sentence(choice))
        notes += rows_in_words([row for row in choice.rows if row.fate != "keep"][:12])
        if choice.bound is not None:
            solvers.append(
                Solver(
                    name="minimum cuts, GSCIP, simulator",
                    problem="activations: seconds of a step",
                    value=choice.step_seconds + choice.seconds,
                    bound=choice.step_seconds + min(choice.bound, choice.seconds),
                )
            )
    again = frozenset(name for choice in planned for name in choice.recomputed)
    steps = tuple(
        msgspec.structs.replace(step, kind="recompute") if _runs_again(step, again) else step for step in plan.steps
    )
    plan = msgspec.structs.replace(plan, steps=steps)
    return msgspec.structs.replace(
        plan,
        notes=(*plan.notes, *notes),
        solvers=(*plan.solvers, *solvers),
        decisions=(*plan.decisions, *decisions),
    )


def _decision(choice: ActivationChoice) -> Decision:
    """What is kept, beside what would be without a limit."""
    counts = Counter(row.fate for row in choice.rows for _ in range(row.count))
    fates = ", ".join(f"{count} {fate}" for fate, count in sorted(counts.items())) or "planned"
    plain = choice.step_seconds
    ways = ((fates, plain + choice.seconds), ("torch's minimum cut, without a limit", plain))
    return Decision(
        kind="activations",
        subject=f"a step that may hold {bytes_text(choice.budget)}" if choice.budget is not None else "a step",
        chosen=fates,
        alternatives=tuple(Alternative(what=what, value=value) for what, value in ways),
        bound=plain + min(choice.bound, choice.seconds) if choice.bound is not None else None,
    )


def _runs_again(step: Step, again: frozenset[str]) -> bool:
    """Whether a step of the backward ends in an op of the forward that runs again."""
    made = step.phase == "backward" and step.kind in ("kernel", "library") and bool(step.ops)
    return made and step.ops[-1] in again
