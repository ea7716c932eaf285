"""The report's roofline: operations a second of each kernel over its arithmetic intensity, under the device's roofs.

After Williams, Waterman and Patterson (CACM 2009). Both axes are logarithmic. A kernel's rate is its operations over
its predicted seconds; what computes nothing (copies, views) has no place in the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ..cost_model.devices import Device
from ..formatting import count_text, seconds_text
from ..summary import StepGroup

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 380, 86, 20, 16, 40
#: Decades of operations a second that are shown below the highest roof.
DECADES = 5.0


def roofline_chart(groups: Sequence[StepGroup], device: Device | None, dtype: str) -> str:
    """SVG; empty without a device or where nothing is computed. Circles grow with the share of the step's time."""
    shown = [group for group in groups if group.flop > 0 and group.bytes_moved > 0 and group.seconds > 0]
    if device is None or not shown:
        return ""
    dtype = dtype or "f32"
    levels = {"matrix units": device.matrix_rate(dtype), "vector units": device.vector_rate(dtype)}
    slopes = {"memory": device.bandwidth, **{cache.name: cache.bandwidth.value for cache in device.caches}}
    slopes = {name: rate for name, rate in slopes.items() if rate >= device.bandwidth}
    places = [(group.flop / group.bytes_moved, group.flop / group.seconds) for group in shown]
    high = math.log10(max([*levels.values(), *(rate for _, rate in places)])) + 0.3
    low = max(high - DECADES, math.log10(min(rate for _, rate in places)) - 0.2)
    ridge = max(levels.values()) / device.bandwidth
    left = math.log10(min([intensity for intensity, _ in places] + [0.1])) - 0.1
    right = math.log10(max([intensity for intensity, _ in places] + [10 * ridge])) + 0.1

    def x(intensity: float) -> float:
        share = (math.log10(intensity) - left) / (right - left)
        return LEFT + (WIDTH - LEFT - RIGHT) * min(max(share, 0.0), 1.0)

    def y(rate: float) -> float:
        share = (math.log10(rate) - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(share, 0.0), 1.0))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Roofline">']
    for power in range(math.ceil(low), math.floor(high) + 1):
        level = f'y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}"'
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" {level}/>')
        text = escape(count_text(10.0**power, "FLOP/s"))
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">{text}</text>')
    for power in range(math.ceil(left), math.floor(right) + 1):
        at = x(10.0**power)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        label = f"{10.0**power:g} FLOP/byte"
        parts.append(f'<text class="axis" x="{at:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{label}</text>')
    top = max(levels.values())
    for name, rate in slopes.items():
        begin, end = max(10.0**left, 10.0**low / rate), min(10.0**right, top / rate)
        if begin < end:
            title = f"{name}: {count_text(rate, 'B')}/s"
            line = f"M{x(begin):.1f} {y(begin * rate):.1f}L{x(end):.1f} {y(end * rate):.1f}"
            parts.append(f'<path class="roof" d="{line}"><title>{escape(title)}</title></path>')
    for name, rate in levels.items():
        begin = min(10.0**right, rate / max(slopes.values()))
        title = f"{name}, {dtype}: {count_text(rate, 'FLOP/s')}"
        line = f"M{x(begin):.1f} {y(rate):.1f}L{x(10.0**right):.1f} {y(rate):.1f}"
        parts.append(f'<path class="roof" d="{line}"><title>{escape(title)}</title></path>')
        place = f'x="{WIDTH - RIGHT - 4}" y="{y(rate) - 4:.1f}" text-anchor="end"'
        parts.append(f'<text class="axis" {place}>{escape(title)}</text>')
    total = sum(group.seconds for group in groups) or 1.0
    kinds: dict[str, int] = {}
    for group, (intensity, rate) in sorted(zip(shown, places, strict=True), key=lambda pair: -pair[0].seconds):
        css = min(kinds.setdefault(f"{group.phase} {group.kind}", len(kinds)), 8)
        radius = 3 + 17 * math.sqrt(group.seconds / total)
        roof = min(top, intensity * device.bandwidth)
        title = (
            f"{group.kind} {group.name}\n{intensity:.3g} FLOP/byte, {count_text(rate, 'FLOP/s')}, "
            f"{100 * rate / roof:.0f} % of the roof\n{seconds_text(group.seconds)} in {group.count}\n{group.place}"
        )
        parts.append(
            f'<circle class="s{css}" data-s="{group.first}" cx="{x(intensity):.1f}" cy="{y(rate):.1f}" '
            f'r="{radius:.1f}" fill-opacity="0.7"><title>{escape(title)}</title></circle>'
        )
    parts.append("</svg>")
    legend = "".join(f'<li><span class="key s{min(i, 8)}"></span>{escape(name)}</li>' for name, i in kinds.items())
    return "\n".join([*parts, f'<ul class="legend">{legend}</ul>'])
