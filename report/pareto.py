"""The report's drawing of time against memory."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..formatting import bytes_text, seconds_text
from ..ir.plan import TradePoint

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 300, 86, 20, 16, 36


def pareto_chart(points: Sequence[TradePoint], budget: int | None) -> str:
    """SVG: predicted time of a step over its peak, the bound below which no choice gets, and the budget."""
    if not points:
        return ""
    sizes = [point.peak for point in points]
    times = [point.seconds for point in points] + [point.bound for point in points]
    low, high = min([*sizes, *([budget] if budget else [])]), max(sizes)
    fast, slow = min(times), max(times)

    def x(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((size - low) / ((high - low) or 1))

    def y(seconds: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (seconds - fast) / ((slow - fast) or 1))

    ordered = sorted(points, key=lambda point: point.peak)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Time against memory">']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        size, seconds = low + share * (high - low), fast + share * (slow - fast)
        level = f'y1="{y(seconds):.1f}" y2="{y(seconds):.1f}"'
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" {level}/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(seconds) + 4:.1f}" text-anchor="end">{seconds_text(seconds)}</text>')
        parts.append(f'<text x="{x(size):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{bytes_text(int(size))}</text>')
    line = " ".join(f"{x(p.peak):.1f},{y(p.bound):.1f}" for p in ordered)
    parts.append(f'<polyline class="grid" fill="none" points="{line}"><title>no choice is faster</title></polyline>')
    line = " ".join(f"{x(p.peak):.1f},{y(p.seconds):.1f}" for p in ordered)
    parts.append(f'<polyline points="{line}" fill="none" stroke="var(--s0)" stroke-width="2"/>')
    for point in ordered:
        title = f"{bytes_text(point.peak)}: {seconds_text(point.seconds)}, {bytes_text(point.saved_bytes)} kept"
        parts.append(
            f'<circle cx="{x(point.peak):.1f}" cy="{y(point.seconds):.1f}" r="4" fill="var(--s0)">'
            f"<title>{escape(title)}</title></circle>"
        )
    if budget is not None and low <= budget <= high:
        place = f'x1="{x(budget):.1f}" x2="{x(budget):.1f}"'
        parts.append(f'<line class="budget" {place} y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="budget" x="{x(budget) + 5:.1f}" y="{TOP + 10}">budget {bytes_text(budget)}</text>')
    parts.append("</svg>")
    return "\n".join(parts)
