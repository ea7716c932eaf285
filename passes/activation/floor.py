"""The least peak: how far it can be brought down, and a bound below which no choice can get it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from .blocks import Block
from .candidates import Candidate, evaluate
from .problem import JointProblem
from .simulate import Simulator

#: Rounds of dropping or keeping values at the peak.
ROUNDS = 12
#: Moves that are tried in a round, those of the largest values.
MOVES = 32
#: Choices that ``wander`` simulates at most, and ops in all; the share of values at the peak among those it changes;
#: how much higher than the least so far a peak may be at first, as a share of it; and the least that counts, too.
STEPS, WANDERED, FOCUS, HOT, SMALL = 1500, 250_000, 0.5, 0.02, 1e-3


def reduce_peak(simulator: Simulator, blocks: Sequence[Block], start: Candidate) -> Candidate:
    """Bring the peak down by no longer keeping, or by keeping, what is live at it. Stops where nothing helps."""
    problem = simulator.problem
    alike = _alike(blocks)
    best = start
    tried: set[frozenset[int]] = {start.saved}
    for _ in range(ROUNDS):
        live = sorted(set(best.simulation.live_at_peak), key=lambda v: (-problem.values[v].bytes, v))
        choices: dict[frozenset[int], None] = {}
        for v in live:
            if v in simulator.made_forward and v not in simulator.handed_out:
                for saved in _moves(best, v, alike.get(v, (v,))):
                    choices.setdefault(saved)
        improved = None
        for saved in [saved for saved in choices if saved not in tried][:MOVES]:
            tried.add(saved)
            candidate = evaluate(simulator, saved, best.swapped, best.shares)
            if candidate.peak < best.peak and (improved is None or candidate.peak < improved.peak):
                improved = candidate
        if improved is None:
            return best
        best = improved
    return best


def wander(simulator: Simulator, start: Candidate) -> Candidate:
    """Simulated annealing from ``start`` on: for graphs that are simulated within a millisecond or so. The same graph
    gets the same answer."""
    problem, rng = simulator.problem, random.Random(0)
    small = SMALL * start.peak
    able = [v for v in sorted(simulator.made_forward - simulator.handed_out) if problem.values[v].bytes >= small]
    able = [v for v in able if v not in start.swapped]
    best = current = start
    steps = min(STEPS, WANDERED // max(1, len(problem.ops))) if able else 0
    for step in range(steps):
        heat = HOT * best.peak * (1 - step / steps) ** 2 + 1
        live = [v for v in dict.fromkeys(current.simulation.live_at_peak) if v in able]
        kept = [v for v in able if v in current.saved]
        saved = set(current.saved)
        for _ in range(rng.choice((1, 1, 2, 3))):
            among = live if rng.random() < FOCUS else kept if rng.random() < 0.5 else able
            saved ^= {rng.choice(among or able)}
        candidate = evaluate(simulator, frozenset(saved), start.swapped, start.shares)
        if candidate.peak <= current.peak or rng.random() < math.exp((current.peak - candidate.peak) / heat):
            current = candidate
            best = min(best, current, key=lambda c: (c.peak, c.seconds))
    return best


def _moves(best: Candidate, value: int, alike: tuple[int, ...]) -> list[frozenset[int]]:
    """What to keep instead: without ``value`` or with it, and where layers are equal the same of all of them, or of
    those whose backward is still to come, when more gradients are held; or of those and of no others."""
    saved = best.saved
    earlier = frozenset(alike[: alike.index(value) + 1])
    groups = (frozenset(alike), frozenset((value,)), earlier)
    found = [saved - group if group & saved else saved | (group - best.swapped) for group in groups]
    return [*found, (saved - frozenset(alike)) | (earlier - best.swapped)]


def _alike(blocks: Sequence[Block]) -> dict[int, tuple[int, ...]]:
    """Value -> the values at the same place in all blocks of its kind, in the forward's order."""
    groups: dict[tuple[str, int], list[int]] = {}
    for block in blocks:
        for place, v in enumerate(block.values):
            groups.setdefault((block.kind, place), []).append(v)
    return {v: tuple(group) for group in groups.values() for v in group}


def lower_bound(simulator: Simulator, candidate: Candidate) -> int:
    """Bytes that are in use at some moment whatever is saved: at each op of the backward what the backward has made and
    still needs, what was given to it, what the user holds, and what the op itself reads and writes in memory."""
    problem = simulator.problem
    run = candidate.simulation
    between = _held_between_uses(simulator, candidate)
    return max(
        (_without_choice(simulator, problem, candidate, position, between) for position in _crowded(run.memory)),
        default=problem.constant,
    )


def _held_between_uses(simulator: Simulator, candidate: Candidate) -> dict[int, tuple[int, int]]:
    """Values of the forward -> the first and last position at which ops of the backward read them. Kept or computed
    again, they are in memory all the while: nothing is computed a third time. (Of inlined ones this holds where the
    first reader is not a generated kernel.)"""
    problem = simulator.problem
    entries = candidate.simulation.entries
    runs = {entry.op: position for position, entry in enumerate(entries) if entry.backward and not entry.again}
    for op in reversed(simulator.backward_ops):  # an inlined op runs with the first that reads it
        if op.index not in runs:
            readers = [runs[u] for v in op.writes for u in problem.users.get(v, ()) if u in runs]
            if readers:
                runs[op.index] = min(readers)
    uses: dict[int, list[int]] = {}
    for op in simulator.backward_ops:
        for v in op.reads:
            if op.index in runs and v in simulator.made_forward and v not in simulator.outputs:
                uses.setdefault(v, []).append(runs[op.index])
    found = {}
    for v, positions in uses.items():
        first = problem.ops[entries[min(positions)].op]
        if not problem.ops[problem.values[v].op].inlined or not first.fused:
            found[v] = (min(positions), max(positions))
    return found


def _crowded(memory: Sequence[int]) -> list[int]:
    """The positions with the most memory."""
    return sorted(range(len(memory)), key=lambda position: -memory[position])[:200]


def _without_choice(
    simulator: Simulator,
    problem: JointProblem,
    candidate: Candidate,
    position: int,
    between: dict[int, tuple[int, int]],
) -> int:
    """The memory at a position without the values that a different choice could do without there."""
    run = candidate.simulation
    entry = run.entries[position]
    if entry.again:
        return problem.constant
    op, values = problem.ops[entry.op], problem.values
    made = [v for v in op.reads if v in simulator.made_forward and v not in simulator.outputs]
    direct = {v for v in made if not problem.ops[values[v].op].inlined}
    direct |= {v for v, (first, last) in between.items() if first <= position <= last}
    ends = {v: end for v, begin, end in run.lives if begin <= position <= end}
    held = [v for v in ends if v not in simulator.made_forward or v in simulator.outputs or v in op.writes]
    # A generated kernel writes over what it is the last to read, if that is there whatever is chosen.
    rooms = [values[v].bytes for v in direct]
    rooms += [values[v].bytes for v in held if ends[v] == position and v not in simulator.given | simulator.outputs]
    written = [values[v].bytes for v in op.writes] if op.fused else []
    others = problem.constant + sum(values[v].bytes for v in held)
    least = sum(values[v].bytes for v in direct) - _matched(written, rooms)
    return others + max([least, *(_at_least(simulator, v) - sum(written) for v in made)])


def _matched(sizes: Sequence[int], rooms: list[int]) -> int:
    """Bytes of the ``sizes`` that find a room of just their size."""
    found = 0
    for size in sizes:
        if size in rooms:
            rooms.remove(size)
            found += size
    return found


def _at_least(simulator: Simulator, value: int) -> int:
    """Bytes that must be in memory for ``value`` to be read: it, or on every way from what is in memory to it something
    that is no smaller than this. Inputs are counted elsewhere."""
    problem = simulator.problem
    known: dict[int, int] = {}
    stack = [value]
    while stack:
        v = stack[-1]
        op = problem.values[v].op
        if v not in simulator.made_forward or v in simulator.outputs:
            known[v] = 0
        elif not problem.ops[op].inlined:
            known[v] = problem.values[v].bytes
        else:
            missing = [u for u in problem.ops[op].reads if u not in known]
            if missing:
                stack += missing
                continue
            most = max((known[u] for u in problem.ops[op].reads), default=0)
            known[v] = min(problem.values[v].bytes, most)
        stack.pop()
    return known[value]
