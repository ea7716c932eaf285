"""What would change a plan the most, read off its own figures."""

from __future__ import annotations

from .formatting import bytes_text
from .ir.plan import Plan
from .summary import Summary


def suggestions(plan: Plan, summary: Summary) -> list[str]:
    """Up to three things that would change the most, read off the plan's own figures."""
    found: list[tuple[float, str]] = []
    peak = max(summary.peak, 1)
    narrower = "sharding" if plan.dtype in ("bf16", "f16") else "a narrower --dtype, or sharding,"
    for role, text in (
        ("saved", "Saved activations hold {share}: {remedy}"),
        ("optimizer", "Optimizer state holds {share}: an optimizer with less state, or sharding it, frees that."),
        ("parameter", "Parameters hold {share}: {narrower} reduces them."),
        ("gradient", "Gradients hold {share}: {narrower} reduces them."),
        ("unused gaps", "Gaps between buffers hold {share}: placement leaves that unused."),
    ):
        size = summary.roles.get(role, 0)
        if size > 0.1 * peak:
            share = f"{bytes_text(size)} ({100 * size / peak:.0f} % of the peak)"
            found.append((size / peak, text.format(share=share, remedy=_less_saved(plan), narrower=narrower)))
    total = sum(summary.bounds.values()) or 1.0
    for bound, text in (
        ("launch", "Launching kernels takes {share} of the time: larger batches or fewer, larger regions help."),
        ("copy", "Copies between memories take {share} of the time: a larger budget needs fewer of them."),
        ("memory", "Moving data takes {share} of the time: fused cascades and narrower dtypes move less."),
    ):
        spent = summary.bounds.get(bound, 0.0)
        if spent > 0.15 * total:
            found.append((spent / total, text.format(share=f"{100 * spent / total:.0f} %")))
    if plan.fallbacks:
        found.append((0.5, f"{len(plan.fallbacks)} ops fall back: their reasons are listed below."))
    return [text for _, text in sorted(found, key=lambda item: -item[0])[:3]]


def _less_saved(plan: Plan) -> str:
    if not plan.training or plan.budget is not None:
        return "a smaller batch or sequence shrinks them in proportion."
    return "--memory-budget recomputes some of them, --pareto says at what price; a smaller batch shrinks all."
