"""A plan as one HTML page that needs no network: style, script and drawings are inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from .. import __version__
from ..budget_planning import ParetoPoint
from ..cli_explain import why
from ..formatting import bytes_text, count_text, seconds_text
from ..ir.plan import Plan
from ..ir.plan_file import PlanFile
from ..passes.dump import PassRecord, read_records
from ..summary import Summary, device_of, summarize
from .charts import by_module, by_role, memory_chart, schedule_chart
from .pareto import pareto_chart

#: IR and generated code beyond this many characters is cut: the page must stay small. ``effcc inspect`` shows all.
TEXT_LIMIT = 1_500_000
ROWS = 200


@dataclass(frozen=True)
class Listing:
    """A text shown folded away."""

    name: str
    lines: int
    text: str
    cut: bool


def render_report(
    loaded: PlanFile,
    dumps: Path | None = None,
    measured: dict[str, float] | None = None,
    pareto: Sequence[ParetoPoint] = (),
) -> str:
    """The page for a plan file; ``dumps`` adds the list of passes, ``measured`` figures beside the predicted ones.

    ``measured`` may hold ``seconds`` and ``peak`` (bytes). ``pareto``: points of time against memory to draw.
    """
    plan = loaded.plan
    summary = summarize(plan)
    device = device_of(plan)
    template = _environment().get_template("page.html.j2")
    return template.render(
        version=__version__,
        plan=plan,
        summary=summary,
        device=device,
        measured=measured or {},
        suggestions=suggestions(plan, summary),
        memory=[
            ("by role", memory_chart(plan, by_role, summary.capacity, "Memory over time by role")),
            ("by module", memory_chart(plan, by_module, summary.capacity, "Memory over time by module")),
        ],
        schedule=schedule_chart(plan),
        pareto=pareto_chart(pareto, plan.budget),
        groups=[
            (group, why(group.seconds, group.flop, group.bytes_moved, group.bound, device, plan.dtype, group.count))
            for group in summary.groups[:ROWS]
        ],
        total_seconds=sum(group.seconds for group in summary.groups) or 1.0,
        repeats=[group for group in summary.groups if group.count > 1][:ROWS],
        passes=_passes(dumps),
        listings=_listings(loaded),
        manifest=loaded.manifest,
        rows=ROWS,
    )


def suggestions(plan: Plan, summary: Summary) -> list[str]:
    """Up to three things that would change the most, read off the plan's own figures."""
    found: list[tuple[float, str]] = []
    peak = max(summary.peak, 1)
    for role, text in (
        ("saved", "Saved activations hold {share}: a smaller batch or sequence shrinks them in proportion."),
        ("optimizer", "Optimizer state holds {share}: an optimizer with less state, or sharding it, frees that."),
        ("parameter", "Parameters hold {share}: a narrower --dtype or sharding reduces them."),
        ("gradient", "Gradients hold {share}: a narrower --dtype halves them."),
        ("unused gaps", "Gaps between buffers hold {share}: placement leaves that unused."),
    ):
        size = summary.roles.get(role, 0)
        if size > 0.1 * peak:
            share = f"{bytes_text(size)} ({100 * size / peak:.0f} % of the peak)"
            found.append((size / peak, text.format(share=share)))
    total = sum(summary.bounds.values()) or 1.0
    for bound, text in (
        ("launch", "Launching kernels takes {share} of the time: larger batches or fewer, larger regions help."),
        ("copy", "Copies between memories take {share} of the time: a larger budget needs fewer of them."),
    ):
        spent = summary.bounds.get(bound, 0.0)
        if spent > 0.15 * total:
            found.append((spent / total, text.format(share=f"{100 * spent / total:.0f} %")))
    if plan.fallbacks:
        found.append((0.5, f"{len(plan.fallbacks)} ops fall back: their reasons are listed below."))
    return [text for _, text in sorted(found, key=lambda item: -item[0])[:3]]


def _passes(dumps: Path | None) -> tuple[PassRecord, ...]:
    return read_records(dumps) if dumps is not None and dumps.is_dir() else ()


def _listings(loaded: PlanFile) -> list[Listing]:
    """Graphs and generated sources, cut so that all together stay under the limit."""
    left = TEXT_LIMIT
    found = []
    for name, text in [*loaded.graphs_text.items(), *sorted(loaded.sources.items())]:
        shown = text[:left]
        left -= len(shown)
        found.append(Listing(name, text.count("\n") + 1, shown, cut=len(shown) < len(text)))
    return found


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=bytes_text, seconds=seconds_text, count=count_text)
    return environment
