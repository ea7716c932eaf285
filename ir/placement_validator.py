"""Independent check of expert placements, such as a solver's: it shares no code with what makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PlanError

_SHOWN = 10
_TOLERANCE = 1e-6

Table = Sequence[Sequence[float]]


def validate_placement(
    found: Mapping[str, Any],
    loads: Table,
    transitions: Sequence[Table],
    ranks: int,
    nodes: int = 1,
    groups: int = 0,
    current: Sequence[Sequence[int]] | None = None,
) -> None:
    """Check what ``effcc place-experts --json`` prints, from the definitions.

    Args:
        loads: [layers][experts] tokens. ``transitions``: [layers - 1][experts][experts] tokens at i, then at j.
        groups: if not 0, all copies of each of so many groups of consecutive experts must lie on one node.
        current: [layers][slots] the placement that migrations are counted from.

    Raises:
        PlanError: naming what is wrong.
    """
    wrong: list[str] = []
    rows = [[int(expert) for expert in layer["slots"]] for layer in found["layers"]]
    if len(rows) != len(loads):
        raise PlanError(f"the placement has {len(rows)} layers, not {len(loads)}")
    experts = len(loads[0])
    where: list[list[set[int]]] = []
    for number, (row, load) in enumerate(zip(rows, loads, strict=True)):
        missing = sorted(set(range(experts)) - set(row))
        if missing or set(row) - set(range(experts)) or len(row) % ranks:
            raise PlanError(f"layer {number}: {len(row)} slots, experts without a slot: {missing[:_SHOWN]}")
        room = len(row) // ranks
        where.append([{slot // room for slot, other in enumerate(row) if other == expert} for expert in range(experts)])
        share = [load[expert] / row.count(expert) for expert in range(experts)]
        devices = [sum(share[expert] for expert in row[rank * room : (rank + 1) * room]) for rank in range(ranks)]
        mean = sum(devices) / ranks
        ratio = max(devices) / mean if mean > 0 else 1.0
        if abs(ratio - found["layers"][number]["max_over_mean"]) > _TOLERANCE * ratio:
            wrong.append(f"layer {number}: max over mean is {ratio}, not {found['layers'][number]['max_over_mean']}")
        if groups:
            size = experts // groups
            for group in range(groups):
                members = range(group * size, (group + 1) * size)
                on = {rank * nodes // ranks for expert in members for rank in where[number][expert]}
                if len(on) > 1:
                    wrong.append(f"layer {number}: group {group} lies on nodes {sorted(on)}")
    device = node = 0.0
    for number, counts in enumerate(transitions):
        at_node = [[{rank * nodes // ranks for rank in places} for places in where[number + i]] for i in (0, 1)]
        for i in range(experts):
            for j in range(experts):
                if counts[i][j]:
                    device += 0 if where[number][i] & where[number + 1][j] else counts[i][j]
                    node += 0 if at_node[0][i] & at_node[1][j] else counts[i][j]
    migrated = 0
    for row, before in zip(rows, current or rows, strict=True):
        room = len(row) // ranks
        for rank in range(ranks):
            rest = list(before[rank * room : (rank + 1) * room])
            for expert in row[rank * room : (rank + 1) * room]:
                if expert in rest:
                    rest.remove(expert)
                else:
                    migrated += 1
    for name, value, said in (
        ("device hops", device, found["hops"]["device"]),
        ("node hops", node, found["hops"]["node"]),
        ("migrated", migrated, found["migrated"]),
    ):
        if abs(value - said) > _TOLERANCE * max(1.0, abs(value)):
            wrong.append(f"{name}: {value}, not {said}")
    if found["bound"] > found["objective"] * (1 + _TOLERANCE):
        wrong.append(f"the bound {found['bound']} is above the objective {found['objective']}")
    if (found["status"] == "optimal") != (found["gap"] == 0):
        wrong.append(f"status {found['status']!r} with a gap of {found['gap']}")
    if wrong:
        more = f"\n  ... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise PlanError("the placement is wrong:\n" + "\n".join(f"  - {line}" for line in wrong[:_SHOWN]) + more)
