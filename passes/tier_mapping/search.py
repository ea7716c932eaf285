"""The best choice that is found, as a mixed-integer program on the game, and a bound on every choice.

Sets
    b in pieces;  k in uses of b;  t in steps
Variables
    in[b,k]   in {0,1}   use k is served from the scratchpad
    stay[b,k] in {0,1}   b stays there between use k and use k+1
    copy[b,k] = in[b,k] - stay[b,k-1]                 for uses that do not make b
    gain[t] >= 0         seconds by which step t is shorter
    stall >= 0           seconds that steps wait for copies, all together
Constraints
    stay[b,k] <= in[b,k], in[b,k+1]
    for each t:  sum of the room of what is there, stays, or is being copied in  <=  capacity
    gain[t] <= sum_b saving[b,t] in[b,k(t)],  gain[t] <= seconds that memory takes beyond arithmetic
    for each t:  seconds of all copies in for uses up to t  <=  seconds of all steps before t, less their gain, + stall
Objective
    most gain less stall, and a little less for each copy

Where pieces lie, and when each copy has its turn at the engine, is left out; so the program's bound holds for all
choices, and what it finds goes through the solver of offsets and the simulator, as the baselines do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...logs import tell_gap
from .baselines import best_fit_heap, greedy
from .game import Choice, Fate, Game
from .outcome import Outcome, makespan, nothing, outcome, without

#: The solver counts in this part of the time of all steps.
_PARTS = 10**7
#: A copy's worth in the objective, as a share of its time: of equals the choice that copies less.
_COPY = 0.001
#: Stays that are tried without, the latest copies first.
_TRIALS = 200


@dataclass(frozen=True)
class TierMapping:
    """``baselines`` by name; ``best`` of all that was found, ``by`` what; no choice is faster than ``bound``."""

    baselines: dict[str, Outcome]
    best: Outcome
    by: str
    bound: float
    optimal: bool

    @property
    def gap(self) -> float:
        return max(0.0, self.best.makespan - self.bound) / self.best.makespan if self.best.makespan else 0.0


def map_tiers(game: Game, *, time_limit: float = 10.0, seed: int = 0) -> TierMapping:
    """The fastest choice that is found within ``time_limit`` seconds of search, beside the baselines."""
    rules: dict[str, Callable[[Game], Choice]] = {
        "all in device memory": nothing,
        "best-fit heap": best_fit_heap,
        "greedy by benefit per byte": greedy,
    }
    baselines = {name: outcome(game, rule(game), seed=seed) for name, rule in rules.items()}
    found, gain, optimal = solve_game(game, baselines["greedy by benefit per byte"].choice, time_limit, seed)
    candidates = dict(baselines)
    if found is not None:
        candidates["mixed-integer program"] = outcome(game, found, seed=seed)
    by, best = min(candidates.items(), key=lambda item: item[1].makespan)
    better = fewer_waits(game, best)
    if better.makespan < best.makespan:
        by, best = f"{by}, improved", better
    bound = max(0.0, game.begins[-1] - gain)
    tell_gap("uses of the scratchpad", best.makespan, bound, lambda seconds: f"{seconds:.6g} s")
    return TierMapping(baselines, best, by, min(bound, best.makespan), optimal and best.makespan <= bound * (1 + 1e-9))


def fewer_waits(game: Game, start: Outcome) -> Outcome:
    """Drop stays whose copies make steps wait for longer than they save, one at a time."""
    best, stays = start, start.stays
    for stay in sorted((s for s in stays if s.copied or s.written >= 0), key=lambda s: -s.piece.bytes)[:_TRIALS]:
        kept = [other for other in best.stays if other is not stay]
        shorter = makespan(game, kept)
        if shorter < best.makespan:
            offsets = tuple(o for o, other in zip(best.offsets, best.stays, strict=True) if other is not stay)
            height = max((o + s.piece.bytes for o, s in zip(offsets, kept, strict=True)), default=0)
            best = Outcome(without(best.choice, stay), tuple(kept), offsets, height, shorter)
    return best


def solve_game(game: Game, hint: Choice, time_limit: float, seed: int) -> tuple[Choice | None, float, bool]:
    """The program's choice, an upper bound on the seconds that any choice saves, and whether the choice is optimal."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    tick = max(game.begins[-1], 1e-12) / _PARTS
    count = len(game.turns)
    there: list[list[Any]] = [[] for _ in range(count)]
    saved: list[list[Any]] = [[] for _ in range(count)]
    copies: list[list[Any]] = [[] for _ in range(count)]
    inside: dict[int, list[Any]] = {}
    staying: dict[int, list[Any]] = {}
    unit = game.alignment
    for piece in game.pieces:
        if game.room(piece) > game.capacity:
            continue
        served = [model.new_bool_var(f"in {piece.id} {k}") for k in range(len(piece.uses))]
        stays = [model.new_bool_var(f"stay {piece.id} {k}") for k in range(len(piece.uses) - 1)]
        inside[piece.id], staying[piece.id] = served, stays
        size = game.room(piece) // unit
        for k, position in enumerate(piece.uses):
            there[position].append(size * served[k])
            saved[position].append(round(game.saving(position, piece.id) / tick) * served[k])
            model.add_hint(served[k], hint[piece.id][k] != "drop")
            before = piece.uses[k - 1] if k else -1
            if k:
                model.add_implication(stays[k - 1], served[k - 1])
                model.add_implication(stays[k - 1], served[k])
                model.add_hint(stays[k - 1], hint[piece.id][k] == "no-copy")
                for t in range(before + 1, position):
                    there[t].append(size * stays[k - 1])
            if k or not piece.made:
                copied = served[k] - stays[k - 1] if k else served[k]
                seconds = round(game.copy_seconds(piece.bytes) / tick)
                copies[position].append(seconds * copied)
                for t in range(max(game.prefetch(piece, k), before + 1), position):
                    there[t].append(size * copied)
    gains: dict[int, Any] = {}
    for t, turn in enumerate(game.turns):
        if there[t]:
            model.add(sum(there[t]) <= game.capacity // unit)
        moved = sum(turn.traffic.values()) / game.slow
        most = max(0, int(max(0.0, moved - turn.arithmetic) / tick) + 1)
        if saved[t]:
            gain = model.new_int_var(0, most, f"gain {t}")
            # A unit more for each rounding, so that the bound holds.
            model.add(gain <= sum(saved[t]) + len(saved[t]))
            gains[t] = gain
    stall = model.new_int_var(0, max(1, round(game.begins[-1] / tick)), "stall")
    running: list[Any] = []
    for t in range(count):
        running += copies[t]
        if copies[t]:
            # A unit more for each rounding, as above.
            model.add(sum(running) <= round(game.begins[t] / tick) + len(running) + stall)
        if t in gains:
            running.append(gains[t])
    price = [term for found in copies for term in found]
    scale = round(1 / _COPY)
    model.maximize(scale * (sum(gains.values()) - stall) - sum(price))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit
    solver.parameters.random_seed = seed
    solver.parameters.num_workers = 1
    solver.parameters.relative_gap_limit = 1e-4
    status = solver.solve(model)
    ceiling = sum(max(0.0, sum(turn.traffic.values()) / game.slow - turn.arithmetic) for turn in game.turns)
    # The price of copies is part of the objective: of the best choice it is no more than a share of its gain and stall.
    upper = (solver.best_objective_bound / scale + _COPY * 2 * game.begins[-1] / tick) * tick
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, ceiling, False
    choice = dict(nothing(game))
    for piece in game.pieces:
        if piece.id in inside:
            fates: list[Fate] = []
            for k, variable in enumerate(inside[piece.id]):
                if not solver.value(variable):
                    fates.append("drop")
                elif (k == 0 and piece.made) or (k and solver.value(staying[piece.id][k - 1])):
                    fates.append("no-copy")
                else:
                    fates.append("copy")
            choice[piece.id] = tuple(fates)
    return choice, min(ceiling, upper), status == cp_model.OPTIMAL
