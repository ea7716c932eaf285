"""What runs of a graph, chosen among alternatives as one model for CP-SAT: kernels, their variants, streams.

Sets
    c in choices, w in the ways of each: seconds, ops that it takes, bytes that it holds from one moment to another
    t in moments: bytes held there whatever is chosen;  limit: bytes that may be held, if there is a limit
Variables
    x[w] in {0,1}    way w is taken
    peak >= 0        bytes held at once
Constraints
    sum of x[w] over the ways of c = 1                          each choice is made
    x[first way of c] = 1 - sum of x[w] over the ways of another choice that c is a part of      c is not made without
    sum of x[w] over the ways that take op o <= 1               no op is in two kernels: where kernels begin and end
    sum of x[w] over a set of ways that wait for each other in a circle <= its size - 1    added when such a set is met
    held[t] + sum of bytes[w] x[w] over the ways that hold them at t <= peak;  peak <= limit
Objective
    least sum of seconds[w] x[w], then the least peak

Choices that are alike (equal layers) are made alike, as one. A greedy answer is the hint, so that an answer is there
whenever time is up, and nothing that the solver is given time for makes it worse. The bound is the solver's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

#: CP-SAT's deterministic seconds for all of its answers together.
EFFORT = 0.2
#: Seconds are counted in these, so that CP-SAT's whole numbers hold them.
TICK = 1e-9
#: Times that circles are ruled out before the greedy answer is taken.
ROUNDS = 20


@dataclass(frozen=True)
class Span:
    """``bytes`` held at the moments ``first`` to ``last``."""

    first: int
    last: int
    bytes: int


@dataclass(frozen=True)
class Way:
    """``takes``: names of the ops that it makes kernels of. ``bytes``: what it holds beside its results, to be told to
    the user. ``aversion``: seconds that it is worse for what is no time, as memory that is short."""

    what: str
    seconds: float
    takes: frozenset[str] = frozenset()
    held: tuple[Span, ...] = ()
    bytes: int = 0
    aversion: float = 0.0

    @property
    def price(self) -> float:
        return self.seconds + self.aversion


@dataclass(frozen=True)
class Part:
    """A choice is made only if choice number ``choice`` takes way ``way``."""

    choice: int
    way: int


@dataclass(frozen=True)
class Choice:
    """``ways``: the first is what is done if nothing is decided. ``like``: choices with the same name and as many ways
    are made alike. ``part``: of an earlier choice's way; then the first way stands for the choice not being made, and
    the others' seconds, which may be below zero, are what they change of that way's."""

    subject: str
    ways: tuple[Way, ...]
    like: str = ""
    part: Part | None = None


@dataclass(frozen=True)
class ScheduleProblem:
    """``held``: bytes at each moment, without those of the ways."""

    choices: tuple[Choice, ...]
    held: tuple[int, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class ScheduleAnswer:
    """``taken[c]``: position of the way of each choice. ``seconds`` are with what the ways are averse to
    (``seconds_of``); no answer takes fewer of them than ``bound``. ``peak``: bytes at once. ``circles``: sets of ways
    that were ruled out. ``fits``: the limit is kept."""

    taken: tuple[int, ...]
    seconds: float
    bound: float
    peak: int
    circles: int = 0
    fits: bool = True

    @property
    def gap(self) -> float:
        return max(0.0, (self.seconds - self.bound) / self.seconds) if self.seconds > 0 else 0.0


#: Given the taken ways by choice, the choices of a set that cannot all be made so; none if all can.
Circle = Callable[[Sequence[int]], Collection[int]]


def no_circles(taken: Sequence[int]) -> Collection[int]:
    return ()


def seconds_of(problem: ScheduleProblem, taken: Sequence[int]) -> float:
    """With what they are averse to: what is minimized."""
    return sum(choice.ways[way].price for choice, way in zip(problem.choices, taken, strict=True))


def time_of(problem: ScheduleProblem, taken: Sequence[int]) -> float:
    """Seconds that they take, without what they are averse to: what the user is told."""
    return sum(choice.ways[way].seconds for choice, way in zip(problem.choices, taken, strict=True))


def peak_of(problem: ScheduleProblem, taken: Sequence[int]) -> int:
    """Bytes held at once."""
    change: dict[int, int] = {}
    for choice, way in zip(problem.choices, taken, strict=True):
        for span in choice.ways[way].held:
            change[span.first] = change.get(span.first, 0) + span.bytes
            change[span.last + 1] = change.get(span.last + 1, 0) - span.bytes
    peak = running = 0
    for moment in range(max([len(problem.held), *(at + 1 for at in change)])):
        running += change.get(moment, 0)
        peak = max(peak, running + (problem.held[moment] if moment < len(problem.held) else 0))
    return peak


def overlapping(problem: ScheduleProblem, taken: Sequence[int]) -> bool:
    """Whether two of the ways take one op."""
    seen: set[str] = set()
    for choice, way in zip(problem.choices, taken, strict=True):
        takes = choice.ways[way].takes
        if seen & takes:
            return True
        seen |= takes
    return False


def choose_ways(problem: ScheduleProblem, circle: Circle = no_circles) -> ScheduleAnswer:
    """The best answer found. The same problem gets the same answer on every machine; without OR-Tools it is the greedy
    one."""
    given = greedy(problem, circle)
    best = answer_of(problem, given, sum(min(way.price for way in choice.ways) for choice in problem.choices))
    if best.seconds <= best.bound + TICK and best.fits:
        return best
    try:
        return _solved(problem, circle, best)
    except ImportError:
        return best


def answer_of(problem: ScheduleProblem, taken: Sequence[int], bound: float, circles: int = 0) -> ScheduleAnswer:
    seconds, peak = seconds_of(problem, taken), peak_of(problem, taken)
    fits = problem.limit is None or peak <= problem.limit
    return ScheduleAnswer(tuple(taken), seconds, min(bound, seconds), peak, circles, fits)


def greedy(problem: ScheduleProblem, circle: Circle = no_circles) -> list[int]:
    """What saves most is taken first; what takes an op of it, or closes a circle, is not taken any more. Where the
    limit is not kept, what saves most bytes for its seconds goes on."""
    taken = [0] * len(problem.choices)
    offers = [
        (choice.ways[0].price - way.price, number, index)
        for number, choice in enumerate(problem.choices)
        for index, way in enumerate(choice.ways)
        if index and choice.part is None and way.price < choice.ways[0].price
    ]
    used: dict[int, frozenset[str]] = {}
    for _, number, index in sorted(offers, key=lambda offer: (-offer[0], offer[1], offer[2])):
        takes = problem.choices[number].ways[index].takes
        if taken[number] or any(takes & other for other in used.values()):
            continue
        taken[number] = index
        if circle(taken):
            taken[number] = 0
        else:
            used[number] = takes
    taken = with_parts(problem, taken)
    return taken if problem.limit is None else _within(problem, taken, circle)


def made(problem: ScheduleProblem, taken: Sequence[int], number: int) -> bool:
    """Whether a choice is to be made: always, but for a part of a way that is not taken."""
    part = problem.choices[number].part
    return part is None or taken[part.choice] == part.way


def with_parts(problem: ScheduleProblem, taken: Sequence[int]) -> list[int]:
    """Choices that are parts, made where they are to be: as they were, else at the least price."""
    found = list(taken)
    for number, choice in enumerate(problem.choices):
        if choice.part is None:
            continue
        if not made(problem, found, number):
            found[number] = 0
        elif not found[number]:
            found[number] = min(range(1, len(choice.ways)), key=lambda index: choice.ways[index].price)
    return found


def _within(problem: ScheduleProblem, taken: list[int], circle: Circle) -> list[int]:
    """Ways exchanged one by one, until the limit is kept or none helps: the least seconds for each byte first."""
    assert problem.limit is not None
    peak, seconds = peak_of(problem, taken), seconds_of(problem, taken)
    while peak > problem.limit:
        best: tuple[float, int, int] | None = None
        for number, choice in enumerate(problem.choices):
            for index in range(len(choice.ways)):
                if choice.part is not None and (not index or not made(problem, taken, number)):
                    continue
                tried = with_parts(problem, [*taken[:number], index, *taken[number + 1 :]])
                less = peak - peak_of(problem, tried)
                if less > 0 and not overlapping(problem, tried) and not circle(tried):
                    price = (seconds_of(problem, tried) - seconds) / less
                    best = min(best or (price, number, index), (price, number, index))
        if best is None:
            return taken
        taken = with_parts(problem, [*taken[: best[1]], best[2], *taken[best[1] + 1 :]])
        peak, seconds = peak_of(problem, taken), seconds_of(problem, taken)
    return taken


def _solved(problem: ScheduleProblem, circle: Circle, given: ScheduleAnswer) -> ScheduleAnswer:
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    x: list[list[cp_model.IntVar]] = []
    alike: dict[tuple[str, int], list[cp_model.IntVar]] = {}
    for number, choice in enumerate(problem.choices):
        key = (choice.like, len(choice.ways))
        if choice.like and key in alike:
            x.append(alike[key])
            continue
        row = [model.new_bool_var(f"x[{number},{index}]") for index in range(len(choice.ways))]
        model.add_exactly_one(row)
        if choice.part is not None:
            model.add(row[0] + x[choice.part.choice][choice.part.way] == 1)
        x.append(row)
        if choice.like:
            alike[key] = row
    for variables in _rivals(problem, x):
        model.add_at_most_one(variables) if len(variables) > 1 else model.add(variables[0] == 0)
    peak = model.new_int_var(0, _most(problem), "peak")
    if problem.limit is not None and given.fits:
        model.add(peak <= problem.limit)
    for base, terms in _moments(problem, x):
        model.add(base + sum(size * variable for size, variable in terms) <= peak)
    weights = [
        (round(way.price / TICK), variable)
        for choice, row in zip(problem.choices, x, strict=True)
        for way, variable in zip(choice.ways, row, strict=True)
    ]
    time = sum(weight * variable for weight, variable in weights)
    over = 0 if given.fits else model.new_int_var(0, _most(problem), "over")
    if not given.fits and problem.limit is not None:
        model.add(over >= peak - problem.limit)  # nothing fits that the greedy search knows of: the least excess
    model.minimize(over if not given.fits else time)
    hinted: set[int] = set()
    for row, way in zip(x, given.taken, strict=True):
        for index, variable in enumerate(row):
            if variable.index not in hinted:
                hinted.add(variable.index)
                model.add_hint(variable, index == way)
    best, spent = given, 0.0
    for circles in range(ROUNDS):
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.max_deterministic_time = max(0.01, EFFORT - spent)
        status = solver.solve(model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            break
        spent += solver.deterministic_time if hasattr(solver, "deterministic_time") else EFFORT / ROUNDS
        taken = [next(index for index, variable in enumerate(row) if solver.value(variable)) for row in x]
        bound = solver.best_objective_bound * TICK if given.fits else given.bound
        closed = circle(taken)
        if not closed:
            found = answer_of(problem, taken, max(bound, given.bound), circles)
            value, known = (found.seconds, best.seconds) if given.fits else (found.peak, best.peak)
            # Sums of the same seconds in another order differ in their last digits.
            if (not found.fits, value - TICK) <= (not best.fits, known):
                best = found
            if best.fits and not given.fits:  # something fits after all: now the fastest of it
                return _solved(problem, circle, replace(best, bound=given.bound))
            break
        best = replace(best, bound=min(max(bound, best.bound), best.seconds), circles=circles + 1)
        ruled_out = {x[number][taken[number]].index: x[number][taken[number]] for number in closed}
        model.add(sum(ruled_out.values()) <= len(ruled_out) - 1)
        if spent >= EFFORT:
            break
    return best


def _rivals(problem: ScheduleProblem, x: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Sets of ways that take one op, of which one is taken at most; one that choices share cannot be taken at all."""
    takers: dict[str, list[Any]] = {}
    for choice, row in zip(problem.choices, x, strict=True):
        for name in frozenset().union(*(way.takes for way in choice.ways)):
            takers.setdefault(name, []).append([v for w, v in zip(choice.ways, row, strict=True) if name in w.takes])
    sets: dict[tuple[int, ...], list[Any]] = {}
    for found in takers.values():
        if len(found) > 1:
            variables = {variable.index: variable for row in found for variable in row}
            sets[tuple(sorted(variables))] = list(variables.values())
            shared = [index for index in variables if sum(any(v.index == index for v in row) for row in found) > 1]
            sets.update({(index,): [variables[index]] for index in shared})
    return list(sets.values())


def _moments(problem: ScheduleProblem, x: Sequence[Sequence[Any]]) -> list[tuple[int, list[tuple[int, Any]]]]:
    """(bytes held anyway, bytes of each variable) for moments that no later one stands for: between two changes, only
    the moment with most bytes counts."""
    spans = [
        (span, variable)
        for choice, row in zip(problem.choices, x, strict=True)
        for way, variable in zip(choice.ways, row, strict=True)
        for span in way.held
        if span.bytes
    ]
    length = max([len(problem.held), *(span.last + 1 for span, _ in spans)])
    cuts = sorted({0, length, *(s.first for s, _ in spans), *(s.last + 1 for s, _ in spans)})
    found = []
    for begin, end in itertools.pairwise(cuts):
        base = max(problem.held[begin:end], default=0)
        found.append((base, [(s.bytes, v) for s, v in spans if s.first <= begin <= s.last]))
    return found


def _most(problem: ScheduleProblem) -> int:
    all_ways = [span.bytes for choice in problem.choices for way in choice.ways for span in way.held]
    return max(problem.held, default=0) + sum(size for size in all_ways if size > 0)


def size_of_model(problem: ScheduleProblem) -> dict[str, int]:
    """Variables and constraints, circles not counted."""
    seen: set[tuple[str, int]] = set()
    variables = 0
    for choice in problem.choices:
        key = (choice.like, len(choice.ways))
        if not choice.like or key not in seen:
            variables += len(choice.ways)
            seen.add(key)
    return {"choices": len(problem.choices), "variables": variables + 1, "moments": len(problem.held)}
