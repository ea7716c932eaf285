"""A value's way from the model's source line through every pass to its kernel and its address."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import OptionError
from ..formatting import bytes_text, seconds_text
from ..ir.graph import Graph, Node
from ..ir.plan import Buffer, Step
from ..ir.printer import print_location, print_node
from ..summary import module_class
from .lineage import Fate, Place, fates, scopes
from .residence import PlannedGraph, Residence
from .stages import Dump, Stage

#: Lines shown of readers, heirs, steps and buffers.
SHOWN = 8


@dataclass(frozen=True)
class Event:
    """What happened to a value at a stage, with the lines that show it."""

    stage: str
    what: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class History:
    """``source`` is the model's line. ``complete``: source, every pass, kernel and address are known (or the value is
    computed by nobody, and the history says which pass removed it)."""

    name: str
    source: str
    events: tuple[Event, ...]
    complete: bool = False


def node_history(dump: Dump, name: str) -> History:
    """What every stage did to ``%name``, in each graph and subgraph that has it; then its steps and buffers.

    ``name`` may say the graph: ``forward_0:%mul``. Events of values that took its place follow under their own name.
    """
    graph, _, value = name.rpartition(":")
    value = value.removeprefix("%")
    chains = dump.chains()
    if graph and graph not in chains:
        raise OptionError(f"there is no graph {graph!r} in {dump.path}", remedy=f"graphs: {', '.join(chains)}")
    events: list[Event] = []
    source, complete = "", True
    for each, stages in chains.items():
        if graph in ("", each):
            found = _follow(dump, each, stages, value)
            events += found.events
            source = source or found.source
            complete = complete and (found.complete or not found.events)
    return History(value, source, tuple(events), complete and bool(events))


class Lineages:
    """Fates between neighbouring stages, worked out once."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], dict[Place, Fate]] = {}

    def between(self, before: Stage, after: Stage) -> dict[Place, Fate]:
        key = before.index, after.index
        if key not in self.known:
            old, new = before.parsed, after.parsed
            self.known[key] = fates(old, new) if old is not None and new is not None else {}
        return self.known[key]


_lineages: dict[int, Lineages] = {}


def lineages_of(dump: Dump) -> Lineages:
    """The lineages of an opened dump, kept as long as another is not asked for."""
    if id(dump) not in _lineages:
        _lineages.clear()
        _lineages[id(dump)] = Lineages()
    return _lineages[id(dump)]


def _follow(dump: Dump, graph: str, stages: Sequence[Stage], name: str) -> History:
    events: list[Event] = []
    source = ""
    here: list[Place] = []
    removed = False
    earlier: Stage | None = None
    for stage in stages:
        parsed = stage.parsed
        if parsed is None:
            continue
        inside = scopes(parsed)
        if here and earlier is not None:
            table = lineages_of(dump).between(earlier, stage)
            old = scopes(earlier.parsed) if earlier.parsed is not None else {}
            following: list[Place] = []
            for place in here:
                fate = table.get(place, Fate("unread"))
                events += _change(stage, place, fate, old, inside)
                following += fate.places
            removed = not following
            here = list(dict.fromkeys(following))
        for scope, inner in inside.items():
            if (scope, name) not in here and name in inner.by_name() and not removed:
                here.append((scope, name))
                events.append(_appearance(stage, scope, inner, name))
        for scope, value in here:
            node = _node(inside, scope, value)
            if node is not None and not source and node.location:
                source = print_location(node.location)[4:-1]
        earlier = stage
    complete = removed
    if here and earlier is not None and earlier.parsed is not None and dump.plan is not None:
        planned = PlannedGraph(dump.plan, graph, earlier.parsed)
        homes = [(place, planned.residence(place)) for place in here]
        for place, home in homes:
            events += _residence(place, home)
        complete = all(home.complete for _, home in homes) and bool(source)
    if here:
        events += _differentiated(dump, graph, name)
    return History(name, source, tuple(dict.fromkeys(events)), complete)


def _node(inside: Mapping[str, Graph], scope: str, name: str) -> Node | None:
    return inside[scope].by_name().get(name) if scope in inside else None


def _label(stage: Stage, scope: str, inner: str) -> str:
    return f"{stage.index:03d} {stage.label} (in @{inner if scope else stage.graph})"


def _appearance(stage: Stage, scope: str, graph: Graph, name: str) -> Event:
    readers = [print_node(node) for node in graph.nodes if name in node.operands()]
    lines = (print_node(graph.by_name()[name]), *(f"  {text}" for text in readers[:SHOWN]))
    return Event(_label(stage, scope, graph.name), f"appears, read by {len(readers)}", lines)


def _change(stage: Stage, place: Place, fate: Fate, old: Mapping[str, Graph], new: Mapping[str, Graph]) -> list[Event]:
    scope, name = place
    before = _node(old, scope, name)
    if before is None:
        return []
    after = [(at, node) for at, value in fate.places if (node := _node(new, at, value)) is not None]
    if fate.how == "kept" and all(node == before for _, node in after):
        return []
    minus = f"- {print_node(before)}"
    plus = [f"+ {print_node(node)}" for _, node in after[:SHOWN]]
    heirs = ", ".join(dict.fromkeys(f"%{node.name}" for _, node in after))
    inner = old[scope].name
    words = {
        "kept": "changes",
        "replaced": f"goes: {heirs} takes its place",
        "folded": f"goes: folded into {heirs}",
        "moved": f"moves to {', '.join(dict.fromkeys(f'%{n.name} in @{new[at].name}' for at, n in after))}",
        "fused": f"goes: fused into {heirs}",
        "unread": "goes: nobody reads it",
    }[fate.how]
    return [Event(_label(stage, scope, inner), words, (minus, *plus))]


def _residence(place: Place, home: Residence) -> list[Event]:
    """Its steps, those that are equal but for the layer in one event; then its memory."""
    name = f"%{place[1]}"
    if home.how == "given":
        return _buffer_events(home.buffers, f"{name} is given: ")
    how = {
        "computed": "",
        "view": f"{name} is a view of %{home.owner}: ",
        "inside": f"{name} lives in registers: ",
        "unknown": "",
    }[home.how]
    groups: dict[str, list[Step]] = {}
    for step in home.steps:
        where = f" in {module_class(step.module)}" if step.module else ""
        groups.setdefault(f"{step.kind} {step.name}{where}, {step.phase}", []).append(step)
    events = [
        Event(
            f"step {', '.join(str(step.id) for step in steps)}",
            f"{how}{what}, {seconds_text(steps[0].seconds)}" + (f" each, {len(steps)} calls" if len(steps) > 1 else ""),
        )
        for what, steps in groups.items()
    ]
    return events + _buffer_events(home.buffers, "its kernel writes " if home.how == "inside" else "")


def _buffer_events(buffers: Sequence[Buffer], relation: str) -> list[Event]:
    """One event for the buffers of all calls of a layer, each with its address."""
    groups: dict[tuple[object, ...], list[Buffer]] = {}
    for buffer in buffers:
        key = buffer.name, buffer.role, buffer.bytes, module_class(buffer.module), buffer.decision
        groups.setdefault(key, []).append(buffer)
    events = []
    for first, *others in groups.values():
        named = f"%{first.name}, " if relation.endswith("writes ") else ""
        size = bytes_text(first.bytes)
        if not others:
            where = f" in {first.module}" if first.module else ""
            what = f"{relation}{named}{first.role}{where}: {size} {_address(first)}, {first.decision}"
            events.append(Event(f"buffer {first.id}", what))
            continue
        where = f" in {module_class(first.module)}" if first.module else ""
        what = f"{relation}{named}{first.role}{where}: {size} each, {first.decision}"
        members = [first, *others]
        lines = [f"{each.id} in {each.module or '-'} {_address(each)}" for each in members[:SHOWN]]
        if len(members) > SHOWN:
            lines.append(f"... and {len(members) - SHOWN} more")
        events.append(Event(f"{len(members)} buffers", what, tuple(lines)))
    return events


def _address(buffer: Buffer) -> str:
    place = f"{buffer.tier}, not placed" if buffer.offset is None else f"{buffer.arena_key} + {buffer.offset}"
    return f"at {place}, steps {buffer.lower} to {buffer.upper}"


def _differentiated(dump: Dump, graph: str, name: str) -> list[Event]:
    """The ops of backward graphs that differentiate the value's op."""
    pattern = re.compile(rf"forward\(%{re.escape(name)}\)")
    events = []
    for other, stage in dump.last().items():
        if other == graph or stage.phase != "backward":
            continue
        lines = tuple(dict.fromkeys(line.strip() for line in stage.text().splitlines() if pattern.search(line)))
        if lines:
            label = f"{stage.index:03d} {stage.label} (in @{other})"
            events.append(Event(label, f"its gradient: {len(lines)} ops", lines[:SHOWN]))
    return events
