"""What the page's script reads: the plan in columns, equal texts once, as JSON that no text can break out of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..formatting import type_text
from ..ir.plan import Plan
from ..summary import peak_position
from .charts import BOTTOM, LEFT, MEMORY_HEIGHT, RIGHT, TOP, WIDTH, by_module, by_role, clock


class _Texts:
    """Texts by number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def page_data(plan: Plan, measured: Sequence[float] = ()) -> str:
    """The JSON text. Times are seconds, sizes bytes; -1 is an offset that there is not."""
    texts = _Texts()
    place = {buffer.id: index for index, buffer in enumerate(plan.buffers)}
    positions = max([len(plan.steps), *(buffer.upper for buffer in plan.buffers)], default=0)
    axis = clock(plan, positions + 1)
    data: dict[str, Any] = {
        "model": plan.model,
        "frame": {"width": WIDTH, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM, "height": MEMORY_HEIGHT},
        "begins": [_short(value) for value in axis.begins],
        "length": _short(axis.length),
        "peak": peak_position(plan),
        "measured": [int(value) for value in measured],
        "graphs": [[texts(graph.name), graph.first_step, graph.last_step] for graph in plan.graphs],
        "steps": {
            "id": [step.id for step in plan.steps],
            "kind": [texts(step.kind) for step in plan.steps],
            "name": [texts(step.name) for step in plan.steps],
            "phase": [texts(step.phase) for step in plan.steps],
            "stream": [texts(step.stream) for step in plan.steps],
            "start": [_short(step.start) for step in plan.steps],
            "seconds": [_short(step.seconds) for step in plan.steps],
            "flop": [step.flop for step in plan.steps],
            "moved": [step.bytes_moved for step in plan.steps],
            "reads": [[place[b] for b in step.reads if b in place] for step in plan.steps],
            "writes": [[place[b] for b in step.writes if b in place] for step in plan.steps],
            "source": [texts(step.source) for step in plan.steps],
            "module": [texts(step.module) for step in plan.steps],
            "ops": [texts(" ".join(step.ops[:12])) for step in plan.steps],
        },
        "buffers": {
            "name": [texts(buffer.name) for buffer in plan.buffers],
            "bytes": [buffer.bytes for buffer in plan.buffers],
            "lower": [buffer.lower for buffer in plan.buffers],
            "upper": [buffer.upper for buffer in plan.buffers],
            "role": [texts(buffer.role) for buffer in plan.buffers],
            "tier": [texts(buffer.tier) for buffer in plan.buffers],
            "arena": [texts(buffer.arena_key) for buffer in plan.buffers],
            "offset": [-1 if buffer.offset is None else buffer.offset for buffer in plan.buffers],
            "source": [texts(buffer.source) for buffer in plan.buffers],
            "module": [texts(buffer.module) for buffer in plan.buffers],
            "type": [texts(type_text(buffer)) for buffer in plan.buffers],
            "decision": [texts(buffer.decision) for buffer in plan.buffers],
            "by": {
                "role": [texts(by_role(buffer)) for buffer in plan.buffers],
                "module": [texts(by_module(buffer)) for buffer in plan.buffers],
            },
        },
    }
    data["texts"] = list(texts.numbers)
    return embedded(data)


def embedded(value: Any) -> str:
    """JSON for a ``<script type="application/json">``: nothing in it ends the element or starts another."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(value: float) -> float:
    """Six digits are more than any drawing shows."""
    return float(f"{value:.6g}")
