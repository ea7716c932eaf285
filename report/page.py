"""A plan as one HTML page that needs no network: style, script and drawings are inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from .. import __version__
from ..cli_explain import AFTER_INDUCTOR, why
from ..formatting import bytes_text, count_text, seconds_text
from ..inspection.candidates import cascade_verdicts
from ..inspection.stages import graphs_of
from ..ir.plan_file import PlanFile
from ..suggestions import suggestions
from ..summary import device_of, summarize
from .cascades import cascade_views
from .charts import by_module, by_role, memory_chart, schedule_chart
from .data import page_data
from .differences import pass_views
from .pareto import pareto_chart
from .roofline import roofline_chart
from .source import source_listings

#: IR and generated code beyond this many characters is cut: the page must stay small. ``effcc inspect`` shows all.
TEXT_LIMIT = 1_500_000
ROWS = 200
#: What a page may wait for the analysis of cascades; ``effcc explain --cascades`` looks at every graph.
ANALYSIS_SECONDS = 15.0


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
    measured: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> str:
    """The page for a plan file; ``dumps`` adds what each pass changed, ``measured`` figures beside the predicted ones.

    ``measured`` may hold ``seconds``, ``peak`` (bytes) and ``memory`` (bytes held at equal distances over a step). The
    model's files are looked for at their recorded paths and in ``folder``.
    """
    plan = loaded.plan
    summary = summarize(plan)
    device = device_of(plan)
    curve: Sequence[float] = (measured or {}).get("memory", ())
    graphs = graphs_of(loaded)
    verdicts, skipped = list(plan.cascades), list[str]()
    if not verdicts:
        verdicts, skipped = cascade_verdicts(graphs, ANALYSIS_SECONDS)
        skipped.append(AFTER_INDUCTOR)
    place = {buffer.id: index for index, buffer in enumerate(plan.buffers)}
    template = _environment().get_template("page.html.j2")
    return template.render(
        version=__version__,
        plan=plan,
        summary=summary,
        device=device,
        measured=measured or {},
        suggestions=suggestions(plan, summary),
        memory=[
            (f"by {key}", memory_chart(plan, group, summary.capacity, f"Memory over time by {key}", key, curve))
            for key, group in (("module", by_module), ("role", by_role))
        ],
        schedule=schedule_chart(plan),
        pareto=pareto_chart(plan.curve, plan.budget),
        roofline=roofline_chart(summary.groups, device, plan.dtype),
        holders=[(holder, place.get(holder.first, 0)) for holder in summary.holders[:ROWS]],
        groups=[
            (group, why(group.seconds, group.flop, group.bytes_moved, group.bound, device, plan.dtype, group.count))
            for group in summary.groups[:ROWS]
        ],
        total_seconds=sum(group.seconds for group in summary.groups) or 1.0,
        cascades=cascade_views(graphs),
        verdicts=verdicts[:ROWS],
        skipped=skipped,
        passes=pass_views(dumps),
        sources=source_listings(plan, graphs, [folder] if folder is not None else []),
        listings=_listings(loaded),
        manifest=loaded.manifest,
        rows=ROWS,
        data=page_data(plan, curve),
    )


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
