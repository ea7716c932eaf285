"""The least peak: how far it can be brought down, and a bound below which no choice can get it."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Block
from .candidates import Candidate, evaluate
from .problem import JointProblem
from .simulate import Simulator

#: Rounds of dropping or keeping values at the peak.
ROUNDS = 12


def reduce_peak(simulator: Simulator, blocks: Sequence[Block], start: Candidate) -> Candidate:
    """Bring the peak down by no longer keeping, or by keeping, what is live at it: one value at a time and, where
    layers are equal, the same value of all of them at once. Stops where nothing helps."""
    problem = simulator.problem
    alike = _alike(blocks)
    best = start
    tried: set[frozenset[int]] = {start.saved}
    for _ in range(ROUNDS):
        run = best.simulation
        live = sorted(set(run.live_at_peak), key=lambda v: (-problem.values[v].bytes, v))
        moves: dict[frozenset[int], None] = {}
        for v in live:
            if v not in simulator.made_forward:
                continue
            for group in (alike.get(v, frozenset((v,))), frozenset((v,))):
                moves.setdefault(group)
        improved = None
        for group in list(moves)[:24]:
            saved = best.saved - group if group & best.saved else best.saved | (group - best.swapped)
            if saved in tried:
                continue
            tried.add(saved)
            candidate = evaluate(simulator, saved, best.swapped, best.shares)
            if candidate.peak < best.peak and (improved is None or candidate.peak < improved.peak):
                improved = candidate
        if improved is None:
            return best
        best = improved
    return best


def _alike(blocks: Sequence[Block]) -> dict[int, frozenset[int]]:
    """Value -> the values at the same place in all blocks of its kind."""
    groups: dict[tuple[str, int], list[int]] = {}
    for block in blocks:
        for place, v in enumerate(block.values):
            groups.setdefault((block.kind, place), []).append(v)
    return {v: frozenset(group) for group in groups.values() for v in group}


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
    op = problem.ops[entry.op]
    made = [v for v in op.reads if v in simulator.made_forward and v not in simulator.outputs]
    direct = {v for v in made if not problem.ops[problem.values[v].op].inlined}
    direct |= {v for v, (first, last) in between.items() if first <= position <= last}
    least = max([sum(problem.values[v].bytes for v in direct), *(_at_least(simulator, v) for v in made)], default=0)
    removable = sum(
        problem.values[v].bytes
        for v in set(run.live_at(position))
        if v in simulator.made_forward and v not in simulator.outputs and v not in op.writes
    )
    return run.memory[position] - removable + least


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
