"""Expert placement beside round robin, EPLB's greedy and ExFlow's recursive bipartition: hops, loads, gaps, times.

    .venv/bin/python benchmarks/expert_placement.py [--instances preferred:64x24x8:1 ...] [--time-limit 25] [--no-keep]

Instances: Markov chains with planted groups (their affinity is known) and with Dirichlet-distributed successors, top-1
and top-2; and the routing of a mixture of experts that is trained for this (``examples/trained_moe.py``), with one copy
of each expert and with half as many slots more, on two nodes. For each: the baselines' points; ours with the usual
weights, and with loads and migrations weighed in several ways (round robin is the placement in use); for each baseline,
whether a point of that curve is nowhere worse: hops between devices, mean load of the busiest device, experts to copy
(and with hops between nodes as a fourth); gap and seconds; and a step of online re-planning after a drift.
Points of the curve have a second each, which is too short for a bound, and ExFlow's integer programs ten in all; more
by ``--curve`` and ``--exflow``. The whole takes under ten minutes (two cores).
Results go to ``benchmarks/results/expert_placement.json``. Seconds depend on what else the machine does:
``--no-seconds`` leaves them out of what is kept.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command does, before numpy is loaded

import numpy as np
from common import environment, keep, show

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from effcc.cost_model.expert_placement.baselines import eplb_global, eplb_hierarchical, round_robin
from effcc.cost_model.expert_placement.exflow import exflow
from effcc.cost_model.expert_placement.online import Replanner
from effcc.cost_model.expert_placement.problem import Ints, Problem, Weights, costs
from effcc.cost_model.expert_placement.routing import Routing, count, from_choices, read_routing
from effcc.cost_model.expert_placement.solver import solve
from expert_routing import planted, preferred, walk

#: Weights of the load with which the curve is drawn, that of hops being 1; of a migration, in steps of tokens that an
#: expert takes part in.
LOADS = (0.0, 0.25, 1.0, 4.0, 16.0)
MIGRATIONS = (0.0, 0.2)
#: Kind, experts x layers x devices, experts of a token.
INSTANCES = (
    "planted:16x4x4:1", "preferred:16x4x4:1", "planted:64x24x8:1", "preferred:64x24x8:1", "preferred:64x24x8:2",
    "planted:256x58x32:1", "preferred:256x58x32:1",
)  # fmt: skip
#: Devices, nodes and groups of the trained model's instances: 4 layers of 16 experts.
TRAINED = (4, 2, 4)
HERE = Path(__file__).parent
_NOT_SHOWN = ("curve", "points", "dominates", "node hops too")
#: Points that are tried for a baseline which the curve does not reach.
_TRIES = 12


def instance(kind: str, experts: int, layers: int, ranks: int, k: int, seed: int) -> Routing:
    generator = np.random.default_rng(seed)
    if kind == "planted":
        first, steps, _ = planted(generator, experts, layers, ranks, 0.5)
    else:
        first, steps = preferred(generator, experts, layers, 0.1)
    return count(from_choices(walk(generator, first, steps, 8000, k), experts))


def trained(trace: Path | None) -> tuple[Routing, Routing]:
    """Train the example and record its routing through the command, or read what was recorded before; counts of all of
    it, and of its end alone."""
    if trace is not None:
        return read_routing(trace), read_routing(trace, window=8192)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.npz"
        command = [sys.executable, "-m", "effcc.cli", "trace-experts", HERE.parent / "examples" / "trained_moe.py"]
        subprocess.run([*map(str, command), "-n", "32", "-o", str(path)], check=True, capture_output=True)
        return read_routing(path), read_routing(path, window=8192)


def point(problem: Problem, slots: Ints) -> tuple[float, float, float, float]:
    """(share of steps that change device, share that change node, mean over layers of max / mean load, share of slots
    that change)."""
    found = costs(problem, slots)
    steps = float(problem.transitions.sum())
    migrated = found.migrated / (problem.layers * problem.slots)
    return found.device / steps, found.node / steps, float(found.max_over_mean.mean()), migrated


def curve(problem: Problem, usual: Ints, seconds: float) -> list[tuple[float, float, float, float]]:
    """Points of ours: the usual weights; loads and migrations weighed differently; loads first, and nothing moved."""
    unit = float(problem.transitions.sum()) / problem.layers / problem.experts
    asked = [Weights(1.0, 1.0, load, unit * share) for load in LOADS for share in MIGRATIONS]
    asked += [Weights(0.0, 0.0, 1.0, 0.0), Weights(1.0, 1.0, 1.0, 1e3 * unit)]
    found = [point(problem, usual)]
    return found + [point(problem, solve(replace(problem, weights=each), time_limit=seconds).slots) for each in asked]


def between(
    problem: Problem, theirs: tuple[float, float, float, float], seconds: float, seed: int
) -> list[tuple[float, float, float, float]]:
    """More points of the curve towards one of theirs: first with loads that count much and migrations that count
    little. One weight for all loads reaches only the convex hull of what is possible; then each layer's loads, and hops
    between nodes, have weights of their own, drawn at random."""
    unit = float(problem.transitions.sum()) / problem.layers / problem.experts
    generator = np.random.default_rng(seed)
    found: list[tuple[float, float, float, float]] = []
    for load, share in itertools.product(LOADS[-2:], (0.03, 0.08)):
        weighed = replace(problem, weights=Weights(1.0, 1.0, load, unit * share))
        found.append(point(problem, solve(weighed, time_limit=seconds).slots))
        if no_worse(found[-1], theirs):
            return found
    while len(found) < _TRIES and not no_worse(found[-1], theirs):
        layer = 10.0 ** generator.uniform(-1.5, 0.5, (problem.layers, 1))
        weights = Weights(1.0, 10.0 ** generator.uniform(-0.3, 0.7), 1.0, 0.01 * unit)
        weighed = replace(problem, loads=problem.loads * layer, weights=weights)
        found.append(point(problem, solve(weighed, time_limit=seconds).slots))
    return found


def no_worse(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    return all(a <= b + 1e-12 for a, b in zip(ours, theirs, strict=True))


def replanning_seconds(problem: Problem, slots: Ints, drifted: Routing) -> float:
    """Longest of five steps after a drift, the first not counted (it loads compiled code)."""
    replanner = Replanner(replace(problem, current=slots, weights=Weights(migration=2.0)), window=4)
    times = [replanner.step(drifted.loads, drifted.transitions).seconds for _ in range(6)]
    return max(times[1:])


def row(name: str, problem: Problem, drifted: Routing, arguments: argparse.Namespace) -> dict[str, Any]:
    problem = replace(problem, current=round_robin(problem))
    baselines = {"round robin": round_robin(problem), "EPLB": eplb_global(problem)}
    if problem.groups > 1:
        baselines["EPLB hierarchical"] = eplb_hierarchical(problem)
    if not arguments.quick and not problem.replicated:
        baselines["ExFlow"] = exflow(problem, arguments.exflow)
    begin = time.perf_counter()
    usual = solve(problem, time_limit=arguments.time_limit, seed=arguments.seed)
    seconds = time.perf_counter() - begin
    ours = curve(problem, usual.slots, arguments.curve)
    points = {name: point(problem, slots) for name, slots in baselines.items()}
    for theirs in points.values():
        if not any(no_worse(each, theirs) for each in ours):
            ours += between(problem, theirs, arguments.curve, arguments.seed)
    dominated = {
        name: any(no_worse((each[0], *each[2:]), (theirs[0], *theirs[2:])) for each in ours)
        for name, theirs in points.items()
    }
    nodes_too = {name: any(no_worse(each, theirs) for each in ours) for name, theirs in points.items()}
    found = {
        "instance": name, "hops": ours[0][0], "max/mean": ours[0][2], "gap": usual.gap, "status": usual.status,
        "seconds": seconds, "re-planning s": replanning_seconds(problem, usual.slots, drifted),
        "curve": ours, "points": points, "dominates": dominated, "node hops too": nodes_too,
    }  # fmt: skip
    if arguments.no_seconds:
        del found["seconds"], found["re-planning s"]
    print(found, flush=True)
    return found


def chains(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for wanted in arguments.instances:
        kind, size, k = wanted.split(":")
        experts, layers, ranks = (int(number) for number in size.split("x"))
        routing = instance(kind, experts, layers, ranks, int(k), arguments.seed)
        drifted = instance(kind, experts, layers, ranks, int(k), arguments.seed + 1000)
        problem = Problem(routing.loads, routing.transitions, ranks)
        rows.append(row(f"{kind}, {size}, top {k}", problem, drifted, arguments))
    return rows


def of_the_trained_model(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    routing, end = trained(arguments.trace)
    ranks, nodes, groups = TRAINED
    experts = routing.loads.shape[1]
    rows = []
    for slots in (experts, experts * 3 // 2):
        problem = Problem(routing.loads, routing.transitions, ranks, nodes, slots, groups)
        layers = routing.loads.shape[0]
        rows.append(row(f"trained, {experts}x{layers}x{ranks}, {slots} slots, {nodes} nodes", problem, end, arguments))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", nargs="*", default=INSTANCES, metavar="KIND:ExLxR:K")
    parser.add_argument("--time-limit", type=float, default=25.0)
    parser.add_argument("--curve", type=float, default=0.9, help="seconds for each point of the curve")
    parser.add_argument("--exflow", type=float, default=10.0, help="seconds for ExFlow's integer programs")
    parser.add_argument("--quick", action="store_true", help="without ExFlow")
    parser.add_argument("--no-trained", dest="trained", action="store_false", help="without the trained model")
    parser.add_argument("--trace", type=Path, help="of the trained model, recorded before")
    parser.add_argument("--no-seconds", action="store_true", help="keep no times: the machine is not quiet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-keep", action="store_true")
    arguments = parser.parse_args()
    about = environment()
    rows = [*(of_the_trained_model(arguments) if arguments.trained else []), *chains(arguments)]
    show(
        "Expert placement",
        [
            {**{key: value for key, value in each.items() if key not in _NOT_SHOWN},
             "dominates": ", ".join(name for name, yes in each["dominates"].items() if yes)}
            for each in rows
        ],
    )  # fmt: skip
    if not arguments.no_keep:
        print("kept:", keep("expert_placement", rows, about))


if __name__ == "__main__":
    main()
