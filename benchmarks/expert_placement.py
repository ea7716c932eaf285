"""Expert placement beside round robin, EPLB's greedy and ExFlow's recursive bipartition: hops, loads, gaps, times.

    .venv/bin/python benchmarks/expert_placement.py [--sizes 16x4x4 64x24x8 256x58x32] [--time-limit 25] [--no-keep]

Instances: Markov chains with planted groups (their affinity is known) and with Dirichlet-distributed successors, top-1
and top-2. For each: the baselines' points; ours with the usual weights and with the load weighed from 0 to 16, and
whether that curve dominates each baseline (hops not above, at a mean load not above); gap and seconds; and a step of
online re-planning after a drift. Results go to ``benchmarks/results/expert_placement.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, keep, show

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from effcc.cost_model.expert_placement.baselines import eplb_global, round_robin
from effcc.cost_model.expert_placement.exflow import exflow
from effcc.cost_model.expert_placement.online import Replanner
from effcc.cost_model.expert_placement.problem import Ints, Problem, Weights, costs
from effcc.cost_model.expert_placement.routing import Routing, count, from_choices
from effcc.cost_model.expert_placement.solver import solve
from expert_routing import planted, preferred, walk

#: Weights of the load with which the curve is drawn, that of hops being 1.
LOADS = (0.0, 0.25, 1.0, 4.0, 16.0)


def instance(kind: str, experts: int, layers: int, ranks: int, k: int, seed: int) -> Routing:
    generator = np.random.default_rng(seed)
    if kind == "planted":
        first, steps, _ = planted(generator, experts, layers, ranks, 0.5)
    else:
        first, steps = preferred(generator, experts, layers, 0.1)
    return count(from_choices(walk(generator, first, steps, 8000, k), experts))


def point(problem: Problem, slots: Ints) -> tuple[float, float]:
    """(share of steps that are hops, mean over layers of max / mean load)."""
    found = costs(problem, slots)
    return found.device / float(problem.transitions.sum()), float(found.max_over_mean.mean())


def replanning_seconds(problem: Problem, slots: Ints, drifted: Routing) -> float:
    """Longest of five steps after a drift, the first not counted (it loads compiled code)."""
    replanner = Replanner(replace(problem, current=slots, weights=Weights(migration=2.0)), window=4)
    times = [replanner.step(drifted.loads, drifted.transitions).seconds for _ in range(6)]
    return max(times[1:])


def row(kind: str, size: tuple[int, int, int], k: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    routing = instance(kind, *size, k, seed)
    problem = Problem(routing.loads, routing.transitions, size[2])
    baselines = {"round robin": round_robin(problem), "EPLB": eplb_global(problem)}
    if not arguments.quick:
        baselines["ExFlow"] = exflow(problem, arguments.exflow)
    begin = time.perf_counter()
    usual = solve(problem, time_limit=arguments.time_limit, seed=seed)
    seconds = time.perf_counter() - begin
    curve = [point(problem, usual.slots)]
    for load in LOADS:
        weights = Weights(1.0, 1.0, load)
        curve.append(point(problem, solve(replace(problem, weights=weights), time_limit=arguments.curve).slots))
    # loads first, then hops as far as they stay what they are
    curve.append(point(problem, solve(replace(problem, weights=Weights(0.0, 0.0, 1.0)), time_limit=5.0).slots))
    points = {name: point(problem, slots) for name, slots in baselines.items()}
    dominated = {
        name: any(hops <= theirs[0] + 1e-12 and load <= theirs[1] + 1e-12 for hops, load in curve)
        for name, theirs in points.items()
    }
    drifted = instance(kind, *size, k, seed + 1000)
    return {
        "instance": f"{kind}, {'x'.join(map(str, size))}, top {k}",
        "hops": curve[0][0], "max/mean": curve[0][1], "gap": usual.gap, "status": usual.status,
        "seconds": seconds, "re-planning s": replanning_seconds(problem, usual.slots, drifted),
        "curve": curve, "points": points, "dominates": dominated,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["16x4x4", "64x24x8", "256x58x32"])
    parser.add_argument("--kinds", nargs="*", default=["planted", "preferred"])
    parser.add_argument("--k", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--time-limit", type=float, default=25.0)
    parser.add_argument("--curve", type=float, default=10.0, help="seconds for each point of the curve")
    parser.add_argument("--exflow", type=float, default=60.0, help="seconds for ExFlow's integer programs")
    parser.add_argument("--quick", action="store_true", help="without ExFlow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-keep", action="store_true")
    arguments = parser.parse_args()
    about = environment()
    rows = []
    for size in arguments.sizes:
        experts, layers, ranks = (int(number) for number in size.split("x"))
        for kind in arguments.kinds:
            for k in arguments.k:
                rows.append(row(kind, (experts, layers, ranks), k, arguments.seed, arguments))
                print(rows[-1], flush=True)
    show(
        "Expert placement",
        [
            {**{key: value for key, value in each.items() if key not in ("curve", "points", "dominates")},
             "dominates": ", ".join(name for name, yes in each["dominates"].items() if yes)}
            for each in rows
        ],
    )  # fmt: skip
    if not arguments.no_keep:
        print("kept:", keep("expert_placement", rows, about))


if __name__ == "__main__":
    main()
