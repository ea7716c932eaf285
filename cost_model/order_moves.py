"""Orders of kernels that need less memory, by moves around the peak: for graphs of many layers, where every layer has a
peak of its own and the windows of ``kernel_order`` see only some of them.

Of what is held at the peak and not needed there, either all that still reads it runs before (with what that needs), or
it is made only afterwards (with what depends on it); or the kernel at the peak itself runs earlier or later. The move
that helps most is taken, until none does. Local search by reinsertion, as for single-machine schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .kernel_order import OrderProblem, use_over

#: Values at the peak of which moves are tried, the largest first; and kernels that are looked at in all evaluations.
VALUES, LOOKED_AT = 12, 200_000
#: What is held this near the peak counts, too: layers that are alike have peaks that are nearly so.
NEAR = 0.97


@dataclass(frozen=True)
class _Graph:
    before: tuple[frozenset[int], ...]
    after: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, problem: OrderProblem) -> _Graph:
        after: list[set[int]] = [set() for _ in range(problem.count)]
        for kernel, needed in enumerate(problem.before):
            for each in needed:
                after[each].add(kernel)
        return cls(tuple(map(frozenset, problem.before)), tuple(map(frozenset, after)))


def moved_around_peak(problem: OrderProblem, order: Sequence[int], enough: int = 0) -> tuple[list[int], int]:
    """An order of no higher peak than ``order``, a legal one, and its peak in bytes. The search ends at a peak of
    ``enough`` bytes. The same problem gets the same answer."""
    graph, best = _Graph.of(problem), list(order)
    held = use_over(problem, best)
    evaluations = LOOKED_AT // max(1, problem.count)
    while evaluations > 0 and max(held, default=0) > enough:
        peak = max(held)
        found: tuple[tuple[int, int], list[int], list[int]] | None = None
        for candidate in _moves(problem, graph, best, held.index(peak)):
            evaluations -= 1
            fresh = use_over(problem, candidate)
            key = _key(fresh, peak)
            if key < (found[0] if found is not None else _key(held, peak)):
                found = key, candidate, fresh
        if found is None:
            break
        _, best, held = found
    return best, max(held, default=0)


def _key(held: Sequence[int], peak: int) -> tuple[int, int]:
    """What is made smaller: the peak, and what is held near what it was."""
    return max(held), sum(each for each in held if each > NEAR * peak)


def _moves(problem: OrderProblem, graph: _Graph, order: list[int], at: int) -> Iterator[list[int]]:
    """Legal orders in which something else is held while the kernel at position ``at`` runs."""
    position = {kernel: place for place, kernel in enumerate(order)}
    kernel = order[at]
    yield from _later(graph, order, at, {kernel})
    earliest = max((position[each] + 1 for each in graph.before[kernel]), default=0)
    if earliest < at:
        yield [*order[:earliest], kernel, *order[earliest:at], *order[at + 1 :]]
    live = [
        value
        for value in problem.values
        if value.made != kernel
        and (value.made < 0 or position[value.made] < at)
        and (value.kept or any(position[each] >= at for each in value.used))
    ]
    for value in sorted(live, key=lambda each: -each.bytes)[:VALUES]:
        rest = {each for each in value.used if position[each] > at}
        if rest and not value.kept and (moved := _with(graph.before, rest, order[at:])) is not None:
            yield [*order[:at], *moved, *(each for each in order[at:] if each not in set(moved))]
        if value.made >= 0 and kernel not in value.used:
            begin = position[value.made]
            dependent = _with(graph.after, {value.made}, [kernel, *order[at - 1 : begin : -1], value.made])
            if dependent is not None:
                yield from _later(graph, order, at, set(dependent))


def _with(edges: Sequence[frozenset[int]], start: set[int], among: Sequence[int]) -> list[int] | None:
    """``start`` and all that is reached from it over ``edges`` within ``among``, in its order; None where its first is
    reached too."""
    allowed, found, waiting = set(among), set(start), list(start)
    while waiting:
        for each in edges[waiting.pop()]:
            if each in allowed and each not in found:
                found.add(each)
                waiting.append(each)
    return None if among[0] in found else [each for each in among if each in found]


def _later(graph: _Graph, order: list[int], at: int, moved: set[int]) -> Iterator[list[int]]:
    """``moved`` kernels, all at positions up to ``at``, right behind it, and right before the first that needs them."""
    needed_by = {each for kernel in moved for each in graph.after[kernel]} - moved
    behind = [each for each in order[at + 1 :]]
    first = next((place for place, each in enumerate(behind) if each in needed_by), len(behind))
    ahead = [each for each in order[: at + 1] if each not in moved]
    group = [each for each in order[: at + 1] if each in moved]
    for place in dict.fromkeys((0, first)):
        if place or order[at] not in moved:
            yield [*ahead, *behind[:place], *group, *behind[place:]]
