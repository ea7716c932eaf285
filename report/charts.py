"""The report's two drawings, as SVG text: memory over time, and the schedule of each stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..formatting import bytes_text, seconds_text
from ..ir.plan import Buffer, Plan, Step
from ..summary import live_use, memory_use, module_class

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1000, 78, 14, 12, 30
MEMORY_HEIGHT = 320
PLOT = WIDTH - LEFT - RIGHT
#: Columns of the memory chart: about one per pixel.
COLUMNS = 450
#: Series shown by name; the rest is "other".
SERIES = 8


@dataclass(frozen=True)
class Clock:
    """Maps positions to the horizontal axis: predicted time, or step numbers for a plan without times."""

    begins: tuple[float, ...]
    length: float
    unit: Callable[[float], str]

    def x(self, value: float) -> float:
        return LEFT + PLOT * min(max(value / self.length, 0.0), 1.0) if self.length else LEFT


def clock(plan: Plan, positions: int) -> Clock:
    """The time at which each position begins. Positions past the last step lie at the end."""
    if plan.seconds > 0 and any(step.seconds > 0 for step in plan.steps):
        begins: list[float] = []
        latest = 0.0
        for step in plan.steps:
            latest = max(latest, step.start)
            begins.append(latest)
        length = max(plan.seconds, max(step.start + step.seconds for step in plan.steps))
        begins += [length] * (positions - len(begins))
        return Clock(tuple(begins), length, seconds_text)
    return Clock(tuple(map(float, range(positions))), float(max(positions, 1)), lambda value: f"step {value:.0f}")


def by_role(buffer: Buffer) -> str:
    return buffer.role


def by_module(buffer: Buffer) -> str:
    """The first parts of the module path that tell layers' parts apart: ``model.layers.*.mlp``."""
    return ".".join(module_class(buffer.module).split(".")[:4]) or f"({buffer.role})"


def memory_chart(
    plan: Plan,
    group: Callable[[Buffer], str],
    capacity: int | None,
    label: str,
    key: str = "",
    measured: Sequence[float] = (),
) -> str:
    """Stacked areas of live bytes on the device, the arenas' extent as a line, and lines for budget and capacity.

    ``key`` names the grouping for the page's script. ``measured``: bytes held at equal distances over a step that ran.
    """
    use = memory_use(plan)
    live = live_use(plan)
    axis = clock(plan, len(use))
    columns = _columns(axis, live)
    shares = _stack(plan, group, len(use), columns)
    top = max([*use, *map(int, measured), plan.budget or 0, 1])
    if capacity is not None and capacity <= 3 * top:
        top = max(top, capacity)
    top = int(top * 1.06)

    def y(value: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (1 - value / top)

    height = MEMORY_HEIGHT
    names = escape(json.dumps(list(shares)))
    more = f' data-memory="{key}" data-top="{top}" data-names="{names}" tabindex="0"' if key else ""
    parts = [_svg(height, label, more), *_grid(axis, height), *_byte_grid(top, y)]
    base = [0.0] * len(columns)
    for index, (name, values) in enumerate(shares.items()):
        upper = [low + value for low, value in zip(base, values, strict=True)]
        points = _outline(axis, columns, base, upper, y)
        title = f"{name}: at most {bytes_text(max(values))}"
        parts.append(f'<path class="s{index}" d="{points}"><title>{escape(title)}</title></path>')
        base = upper
    parts.append(f'<path class="use" d="{_line(axis, columns, [float(use[c]) for c in columns], y)}"/>')
    if measured:
        parts.append(f'<path class="measured" d="{_even(measured, y)}"><title>measured</title></path>')
    for size, css, text in ((plan.budget, "budget", "budget"), (capacity, "capacity", "device memory")):
        if size is not None and size <= top:
            line = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(size):.1f}" y2="{y(size):.1f}"'
            parts.append(f'<line class="{css}" {line}/>')
            parts.append(
                f'<text class="{css}" x="{WIDTH - RIGHT - 4}" y="{y(size) - 4:.1f}" text-anchor="end">'
                f"{text} {bytes_text(size)}</text>"
            )
    peak = max(range(len(use)), key=lambda position: live[position], default=0)
    if use:
        x = axis.x(axis.begins[peak])
        anchor = "end" if x > WIDTH / 2 else "start"
        shift = -6 if anchor == "end" else 6
        parts.append(f'<line class="peak" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(
            f'<text class="peak" x="{x + shift:.1f}" y="{TOP + 12}" text-anchor="{anchor}">'
            f"peak {bytes_text(max(use))}</text>"
        )
    parts.append("</svg>")
    return "\n".join([*parts, _legend(list(shares))])


def schedule_chart(plan: Plan) -> str:
    """One row a stream; a rectangle a step, neighbours too thin to see drawn as one."""
    steps = [step for step in plan.steps if step.kind != "free"]
    if not steps:
        return ""
    axis = clock(plan, len(plan.steps))
    position = {step.id: index for index, step in enumerate(plan.steps)}
    streams = list(dict.fromkeys((step.device, step.stream) for step in steps))
    several = len({device for device, _ in streams}) > 1
    row, height = 34, TOP + 34 * len(streams) + BOTTOM
    parts = [_svg(height, "Schedule: one row a stream, time to the right"), *_grid(axis, height)]
    kinds: dict[str, int] = {}
    for index, (device, stream) in enumerate(streams):
        y = TOP + row * index
        name = f"{device}: {stream}" if several else stream
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{y + 20}" text-anchor="end">{escape(name)}</text>')
        mine = (step for step in steps if (step.device, step.stream) == (device, stream))
        spans = [_span(step, axis, position[step.id]) for step in sorted(mine, key=lambda s: (s.start, position[s.id]))]
        for begin, end, kind, title, where in _merge(spans):
            css = min(kinds.setdefault(kind, len(kinds)), SERIES)
            width = max(end - begin, 0.6)
            parts.append(
                f'<rect class="s{css}" data-s="{where}" x="{begin:.1f}" y="{y + 4}" width="{width:.1f}" '
                f'height="{row - 10}" rx="1">'
                f"<title>{escape(title)}</title></rect>"
            )
    parts.append("</svg>")
    return "\n".join([*parts, _legend(list(kinds))])


Span = tuple[float, float, str, str, int]


def _span(step: Step, axis: Clock, position: int) -> Span:
    begin = axis.x(axis.begins[position])
    by_time = axis.unit is seconds_text
    end = axis.x(step.start + step.seconds) if by_time else axis.x(axis.begins[position] + 1)
    if by_time:
        begin = axis.x(step.start)
    title = f"{step.kind} {step.name}\n{seconds_text(step.seconds)}"
    if step.module or step.source:
        title += f"\n{step.module} {step.source}"
    kind = step.kind if step.kind == step.phase else f"{step.phase} {step.kind}"
    return begin, end, kind, title, position


def _merge(spans: Sequence[Span]) -> list[Span]:
    """Spans of one kind that follow each other and are less than a pixel wide become one."""
    runs: list[list[Span]] = []
    for span in spans:
        if runs:
            begin, end, kind = runs[-1][0][0], runs[-1][-1][1], runs[-1][0][2]
            thin = span[1] - span[0] < 1.0 and (len(runs[-1]) > 1 or end - begin < 1.0)
            if kind == span[2] and thin and span[0] - end < 0.5:
                runs[-1].append(span)
                continue
        runs.append([span])
    merged = []
    for run in runs:
        first = run[0]
        title = first[3] if len(run) == 1 else f"{len(run)} steps from {first[3].partition(chr(10))[0]}"
        merged.append((first[0], max(span[1] for span in run), first[2], title, first[4]))
    return merged


def _columns(axis: Clock, live: Sequence[int]) -> list[int]:
    """The positions drawn: in each column of the axis the one with the most live bytes."""
    best: dict[int, int] = {}
    for position, size in enumerate(live):
        column = int((axis.x(axis.begins[position]) - LEFT) / PLOT * COLUMNS)
        if column not in best or size > live[best[column]]:
            best[column] = position
    return sorted(best.values())


def _stack(
    plan: Plan, group: Callable[[Buffer], str], positions: int, columns: Sequence[int]
) -> Mapping[str, list[float]]:
    """Bytes of each group at the drawn positions, the group with the largest peak at the bottom."""
    changes: dict[str, list[int]] = {}
    for buffer in plan.buffers:
        if buffer.tier == "device" and buffer.upper > buffer.lower:
            change = changes.setdefault(group(buffer), [0] * (positions + 1))
            change[buffer.lower] += buffer.bytes
            change[buffer.upper] -= buffer.bytes
    series: dict[str, list[float]] = {}
    for name, change in changes.items():
        running, values = 0, []
        for delta in change[:-1]:
            running += delta
            values.append(running)
        series[name] = [float(values[position]) for position in columns]
    ordered = sorted(series, key=lambda name: -max(series[name], default=0.0))
    shown = {name: series[name] for name in ordered[:SERIES]}
    rest = [series[name] for name in ordered[SERIES:]]
    if rest:
        shown["other"] = [sum(values) for values in zip(*rest, strict=True)]
    return shown


def _outline(
    axis: Clock, columns: Sequence[int], lower: Sequence[float], upper: Sequence[float], y: Callable[[float], float]
) -> str:
    """A closed path of steps: along the upper edge, back along the lower."""
    if not columns:
        return ""
    ends = [*(axis.x(axis.begins[column]) for column in columns[1:]), float(WIDTH - RIGHT)]
    forth = [f"M{axis.x(axis.begins[columns[0]]):.1f} {y(upper[0]):.1f}"]
    for end, value, following in zip(ends, upper, [*upper[1:], upper[-1]], strict=True):
        forth.append(f"H{end:.1f}V{y(following):.1f}" if following != value else f"H{end:.1f}")
    starts = [axis.x(axis.begins[column]) for column in columns]
    back = [f"V{y(lower[-1]):.1f}"]
    for index in range(len(columns) - 1, -1, -1):
        back.append(f"V{y(lower[index]):.1f}H{starts[index]:.1f}")
    return "".join([*forth, *back, "Z"])


def _line(axis: Clock, columns: Sequence[int], values: Sequence[float], y: Callable[[float], float]) -> str:
    if not columns:
        return ""
    parts = [f"M{axis.x(axis.begins[columns[0]]):.1f} {y(values[0]):.1f}"]
    for column, value in zip(columns[1:], values[1:], strict=True):
        parts.append(f"H{axis.x(axis.begins[column]):.1f}V{y(value):.1f}")
    return "".join([*parts, f"H{WIDTH - RIGHT}"])


def _even(values: Sequence[float], y: Callable[[float], float]) -> str:
    """A curve over the whole width through values at equal distances."""
    step = PLOT / max(len(values) - 1, 1)
    points = (f"{LEFT + index * step:.1f} {y(value):.1f}" for index, value in enumerate(values))
    return "M" + "L".join(points)


def _svg(height: int, label: str, more: str = "") -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}"{more}>'
    return f"{head}<title>{escape(label)}</title>"


def _grid(axis: Clock, height: int) -> list[str]:
    parts = []
    for tick in range(6):
        value = axis.length * tick / 5
        x = axis.x(value)
        anchor = "end" if tick == 5 else "middle"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        text = escape(axis.unit(value)) if value else "0"
        parts.append(f'<text class="axis" x="{x:.1f}" y="{height - 10}" text-anchor="{anchor}">{text}</text>')
    return parts


def _byte_grid(top: int, y: Callable[[float], float]) -> list[str]:
    unit = 1024 ** max(0, (top.bit_length() - 1) // 10)
    step = next(s * unit for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if top / (s * unit) <= 6)
    parts, value = [], step
    while value < top:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        text = bytes_text(value).replace(".00", "").replace(".0 ", " ")
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
        value += step
    return parts


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<li><span class="key s{index}"></span>{escape(name)}</li>' for index, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'
