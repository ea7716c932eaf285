"""``effcc place-experts``: routing traces or loads to a placement of experts on devices, with a bound."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_support import JsonOption, console, print_json, read_text, stage, table, write_text
from .errors import OptionError, PlacementError
from .formatting import count_text, seconds_text

if TYPE_CHECKING:
    from .cost_model.expert_placement.problem import Problem, Result, Weights
    from .cost_model.expert_placement.routing import Routing

_POLICIES = ("hierarchical", "global", "joint")


def place_experts_command(
    file: Annotated[
        Path, typer.Argument(help="Trace (CSV token,layer,slot,expert or npz) or load matrix (CSV without header).")
    ],
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Devices; consecutive ones share a node.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes that the devices are on.")] = 1,
    slots: Annotated[
        int | None, typer.Option("--slots", min=1, help="Physical slots of a layer in all; the experts, if not given.")
    ] = None,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Groups of consecutive experts.")] = 1,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="hierarchical (groups stay on nodes), global (loads) or joint (loads and hops)."),
    ] = None,
    current: Annotated[
        Path | None, typer.Option("--current", help="The placement in use: what this command printed with --json.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Such as hops=1,load=1,migration=0; also node, by default as hops.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option("--experts", min=1, help="Their number, where the trace does not name the last.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Count only the last so many tokens of the trace.")
    ] = None,
    hysteresis: Annotated[
        float, typer.Option("--hysteresis", min=0.0, max=1.0, help="Keep --current unless this share is won.")
    ] = 0.0,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.0, help="Seconds.")] = 25.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the searches' random choices.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the JSON here, for --current.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Place the experts of every MoE layer on devices: few hops between devices and nodes, even loads, few migrations.

    The objective is what the placement costs: hops (token-expert pairs that change device from layer to layer, plus
    those that change node), tokens on each layer's busiest device, experts to copy, each times its weight. The bound
    holds for every placement. The result is checked by a validator that shares no code with the solver.
    """
    # Before numpy is loaded: its eigenvalues of small matrices are no faster with more threads, and the search has one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from .cost_model.expert_placement.online import choose
    from .cost_model.expert_placement.problem import Problem
    from .cost_model.expert_placement.routing import read_routing

    routing = read_routing(file, experts, window)
    chosen = policy or ("joint" if routing.transitions.any() else "hierarchical" if groups > 1 else "global")
    if chosen not in _POLICIES:
        raise OptionError(f"unknown policy {chosen!r}", remedy=f"known: {', '.join(_POLICIES)}")
    problem = Problem(
        routing.loads, routing.transitions, ranks, nodes, slots or 0, groups, chosen == "hierarchical",
        None if current is None else _read_slots(current), _weights(weights, chosen),
    )  # fmt: skip
    with stage(f"placing {problem.experts} experts of {problem.layers} layers", json):
        result = choose(problem, hysteresis, time_limit=time_limit, seed=seed)
    facts = _facts(problem, result)
    _check(facts, problem)
    if output is not None:
        import msgspec

        write_text(output, msgspec.json.format(msgspec.json.encode(facts), indent=2).decode() + "\n")
    if json:
        print_json(facts)
    else:
        _print(problem, routing, result)


def _weights(text: str | None, policy: str) -> Weights:
    """The weights that a policy has by itself, with those that ``name=number,...`` gives."""
    from .cost_model.expert_placement.problem import Weights

    values = {"hops": 1.0 if policy == "joint" else 0.0, "load": 1.0, "migration": 0.0}
    for word in (text or "").split(","):
        name, equals, number = word.strip().partition("=")
        if not word.strip():
            continue
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in ("hops", "node", "load", "migration") or not equals or not 0 <= value < 1e12:
            raise OptionError(
                f"weight {word.strip()!r} is not understood",
                remedy="write name=number with names hops, node, load, migration and numbers from 0",
            )
        values[name] = value
    return Weights(values["hops"], values.get("node", values["hops"]), values["load"], values["migration"])


def _read_slots(path: Path) -> Any:
    """[layers, slots] of a placement file."""
    import msgspec
    import numpy as np

    try:
        found = msgspec.json.decode(read_text(path, "placement"))
        rows = [[int(expert) for expert in layer["slots"]] for layer in found["layers"]]
        slots = np.array(rows, np.int64)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise PlacementError(
            "this is not a placement", where=str(path), remedy="give what 'effcc place-experts --json' printed"
        ) from error
    if slots.ndim != 2 or slots.size == 0:
        raise PlacementError("the placement is empty", where=str(path), remedy="give one of the same model")
    return slots


def _facts(problem: Problem, result: Result) -> dict[str, Any]:
    ratios = result.costs.max_over_mean.tolist()
    rows = [{"slots": row.tolist(), "max_over_mean": ratio} for row, ratio in zip(result.slots, ratios, strict=True)]
    return {
        "layers": rows,
        "hops": {"device": _number(result.costs.device), "node": _number(result.costs.node)},
        "migrated": result.costs.migrated,
        "objective": _number(result.objective),
        "bound": _number(result.bound),
        "gap": result.gap,
        "seconds": result.seconds,
        "status": result.status,
    }


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _check(facts: dict[str, Any], problem: Problem) -> None:
    from .ir.placement_validator import validate_placement

    current = None if problem.current is None else problem.current.tolist()
    groups = problem.groups if problem.grouped and problem.nodes > 1 else 0
    transitions = problem.transitions.tolist() if problem.has_transitions else []
    validate_placement(facts, problem.loads.tolist(), transitions, problem.ranks, problem.nodes, groups, current)


def _print(problem: Problem, routing: Routing, result: Result) -> None:
    out = console()
    rows = table("", "value", "", right=("value",))
    total = float(problem.transitions.sum())
    if total:
        rows.add_row("device hops", count_text(result.costs.device), f"{result.costs.device / total:.2%} of all steps")
        if problem.nodes > 1:
            rows.add_row("node hops", count_text(result.costs.node), f"{result.costs.node / total:.2%} of all steps")
    ratios = result.costs.max_over_mean
    rows.add_row("max / mean load", f"{ratios.mean():.4f}", f"mean over layers; {ratios.max():.4f} in the worst")
    if problem.current is not None:
        rows.add_row("migrated", str(result.costs.migrated), f"of {problem.slots * problem.layers} slots")
    rows.add_row("objective", f"{result.objective:.8g}", f"at least {result.bound:.8g} for any placement")
    rows.add_row("gap", f"{result.gap:.3%}", f"{result.status}, {seconds_text(result.seconds)}")
    out.print(rows)
    if problem.slots > _WIDEST:
        out.print("--json prints the slots")
        return
    width = problem.per_rank
    for number, row in zip(routing.layers[:_SHOWN], result.slots.tolist(), strict=False):
        devices = " | ".join(" ".join(map(str, row[at : at + width])) for at in range(0, problem.slots, width))
        out.print(f"layer {number}: {devices}", markup=False)
    if problem.layers > _SHOWN:
        out.print(f"... and {problem.layers - _SHOWN} more layers; --json prints all")


#: Layers whose slots are shown, and most slots of one.
_SHOWN, _WIDEST = 8, 64
