"""A plan as a notebook shows it: the verdict, and memory over time."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..ir.plan import Plan
from ..summary import summarize
from .charts import by_module, memory_chart


def plan_html(plan: Plan) -> str:
    """A fragment of HTML with its own style, for ``_repr_html_``; nothing in it comes from elsewhere."""
    summary = summarize(plan)
    style = (Path(__file__).parent / "notebook.css").read_text(encoding="utf-8")
    words = "".join(f"<p>{escape(line)}</p>" for line in summary.words)
    chart = memory_chart(plan, by_module, summary.capacity, "Memory over time by module")
    title = f"<b>{escape(plan.model)}</b> on {escape(plan.device)}"
    return f'<div class="effcc-plan"><style>{style}</style><p>{title}</p>{words}{chart}</div>'
