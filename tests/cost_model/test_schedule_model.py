"""The choice among ways as one model: against all combinations of small problems, with overlaps, circles and limits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence

import pytest
from effcc.cost_model.schedule_model import (
    TICK,
    Choice,
    Part,
    ScheduleProblem,
    Span,
    Way,
    choose_ways,
    greedy,
    made,
    overlapping,
    peak_of,
    seconds_of,
    size_of_model,
)
from fresh_seed import fresh_random


def random_problem(rng: random.Random, limited: bool) -> ScheduleProblem:
    """Times of whole microseconds; ways share ops, and hold bytes for a while."""
    choices = []
    for number in range(rng.randint(2, 6)):
        written = rng.randint(5, 60)
        begin = rng.randint(0, 6)
        ways = [Way("as written", written * 1e-6, held=(Span(begin, begin + 3, rng.randint(0, 50)),))]
        for index in range(rng.randint(1, 3)):
            takes = frozenset(rng.sample("abcdefgh", rng.randint(1, 3)))
            held = (Span(begin, begin + rng.randint(0, 3), rng.randint(0, 30)),)
            ways.append(Way(f"way {index}", rng.randint(1, 70) * 1e-6, takes, held))
        choices.append(Choice(f"choice {number}", tuple(ways)))
    for number in range(rng.randint(0, 2)):  # choices of how a way is done
        part = Part(rng.randrange(len(choices)), 1)
        if choices[part.choice].part is None:
            ways = [Way(f"tile {index}", rng.randint(-20, 20) * 1e-6) for index in range(rng.randint(1, 3))]
            choices.append(Choice(f"kernel {number}", (Way("not made", 0.0), *ways), part=part))
    held = tuple(rng.randint(0, 40) for _ in range(10))
    return ScheduleProblem(tuple(choices), held, rng.randint(60, 140) if limited else None)


def every(problem: ScheduleProblem, circle: object = None) -> float | None:
    """Least seconds of the combinations that are allowed."""
    best = None
    for taken in itertools.product(*(range(len(choice.ways)) for choice in problem.choices)):
        if overlapping(problem, taken) or (problem.limit is not None and peak_of(problem, taken) > problem.limit):
            continue
        if any((taken[n] > 0) != made(problem, taken, n) for n, c in enumerate(problem.choices) if c.part is not None):
            continue
        if circle is not None and circle(taken):  # type: ignore[operator]
            continue
        seconds = seconds_of(problem, taken)
        best = seconds if best is None else min(best, seconds)
    return best


@pytest.mark.parametrize("limited", [False, True])
def test_nothing_is_better_than_what_is_chosen(limited: bool) -> None:
    rng = fresh_random()
    for _ in range(40):
        problem = random_problem(rng, limited)
        best, found = every(problem), choose_ways(problem)
        if best is None:
            assert not found.fits
            continue
        assert found.fits
        assert not overlapping(problem, found.taken)
        assert found.seconds == pytest.approx(best, abs=TICK)
        assert found.bound == pytest.approx(best, abs=2 * TICK), "small problems are solved to the end"
        assert problem.limit is None or peak_of(problem, found.taken) <= problem.limit


def test_two_that_save_more_together_than_the_one_that_saves_most() -> None:
    def choice(name: str, saved: int, takes: str) -> Choice:
        return Choice(name, (Way("as written", 20e-6), Way("fused", (20 - saved) * 1e-6, frozenset(takes))))

    problem = ScheduleProblem((choice("most", 10, "ab"), choice("first", 8, "a"), choice("second", 8, "b")))
    assert greedy(problem) == [1, 0, 0]
    assert choose_ways(problem).taken == (0, 1, 1)


def test_ways_that_wait_for_each_other_are_not_taken_together() -> None:
    rng = fresh_random()
    for _ in range(20):
        problem = random_problem(rng, False)
        whole = [number for number, choice in enumerate(problem.choices) if choice.part is None]
        pair = rng.sample(whole, 2)

        def circle(taken: Sequence[int], pair: list[int] = pair) -> Collection[int]:
            return pair if all(taken[number] for number in pair) else ()

        found = choose_ways(problem, circle)
        assert not circle(found.taken)
        assert found.seconds == pytest.approx(every(problem, circle), abs=TICK)


def test_what_is_alike_is_done_alike() -> None:
    """Two layers that could both be fused but for one op that they share with a third component."""
    layer = (Way("as written", 10e-6), Way("one kernel", 4e-6))
    layers = [Choice(f"layer {number}", layer, like="layer") for number in range(3)]
    found = choose_ways(ScheduleProblem((*layers, Choice("loss", (Way("as written", 3e-6), Way("chunks", 2e-6))))))
    assert found.taken == (1, 1, 1, 1)
    assert found.seconds == pytest.approx(14e-6)
    assert size_of_model(ScheduleProblem(tuple(layers)))["variables"] == 3
    rivals = [Choice(each.subject, (layer[0], Way("one kernel", 4e-6, frozenset("x"))), "layer") for each in layers]
    assert sum(choose_ways(ScheduleProblem(tuple(rivals))).taken) <= 1, "all of them would take op x"


def test_aversion_decides_but_is_no_time() -> None:
    slower = Choice("wide", (Way("as written", 5e-6, aversion=2e-6), Way("one kernel", 6e-6)))
    found = choose_ways(ScheduleProblem((slower,)))
    assert found.taken == (1,)


def test_how_a_way_is_done_decides_whether_it_is_done() -> None:
    """One kernel is slower than what is written, unless it is generated in its second way."""
    attention = Choice("attention", (Way("as written", 10e-6), Way("one kernel", 11e-6)))
    ways = (Way("not made", 0.0), Way("64 x 64", 0.0), Way("128 x 512", -3e-6))
    found = choose_ways(ScheduleProblem((attention, Choice("its kernel", ways, part=Part(0, 1)))))
    assert found.taken == (1, 2)
    assert found.seconds == pytest.approx(8e-6)
    slower = (Way("not made", 0.0), Way("64 x 64", 0.0))
    assert choose_ways(ScheduleProblem((attention, Choice("its kernel", slower, part=Part(0, 1))))).taken == (0, 0)
