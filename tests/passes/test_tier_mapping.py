"""The memory-mapping game: its outcome counted by hand, its choices and bound against brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from effcc.ir.overlaps import Piece as Rectangle
from effcc.ir.overlaps import overlaps
from effcc.passes.tier_mapping.baselines import best_fit_heap, greedy
from effcc.passes.tier_mapping.game import Choice, Game, Piece, Turn
from effcc.passes.tier_mapping.outcome import Outcome, crowded, makespan, nothing, outcome, stays_of
from effcc.passes.tier_mapping.search import map_tiers
from fresh_seed import fresh_random


def game(turns: list[dict[int, float]], pieces: list[Piece], capacity: int, arithmetic: float = 0.0) -> Game:
    """Device memory at one byte a second, the scratchpad at ten, copies at one."""
    steps = tuple(Turn(f"t{i}", arithmetic, 0.0, traffic) for i, traffic in enumerate(turns))
    return Game(steps, tuple(pieces), slow=1.0, fast=10.0, copy=1.0, latency=0.0, capacity=capacity, alignment=1)


def random_game(rng: random.Random, pieces: int = 3, turns: int = 5) -> Game:
    traffic: list[dict[int, float]] = [{} for _ in range(turns)]
    made = []
    for b in range(pieces):
        uses = sorted(rng.sample(range(turns), rng.randint(1, 3)))
        size = rng.randint(1, 8)
        for position in uses:
            traffic[position][b] = float(size)
        born = rng.random() < 0.6
        writes = tuple(born and k == 0 for k in range(len(uses)))
        made.append(Piece(b, f"b{b}", size, tuple(uses), writes, born, rng.random() < 0.3 or not born))
    return game(traffic, made, rng.randint(4, 14), arithmetic=rng.choice([0.0, 0.5, 3.0]))


def every_choice(played: Game) -> Iterator[Choice]:
    rows = []
    for piece in played.pieces:
        options = []
        for fates in itertools.product(("copy", "no-copy", "drop"), repeat=len(piece.uses)):
            there = False
            for use, fate in enumerate(fates):
                born = piece.made and use == 0
                if (fate == "copy" and born) or (fate == "no-copy" and not (born or there)):
                    break
                there = fate != "drop"
            else:
                options.append(fates)
        rows.append(options)
    for picked in itertools.product(*rows):
        yield {piece.id: fates for piece, fates in zip(played.pieces, picked, strict=True)}


def check(played: Game, found: Outcome) -> None:
    rectangles = [
        Rectangle(s.first, s.last + 1, o, o + s.piece.bytes, s.piece.name)
        for s, o in zip(found.stays, found.offsets, strict=True)
    ]
    assert overlaps(rectangles) == []
    assert all(r.high <= played.capacity for r in rectangles)
    assert found.stays == tuple(stays_of(played, found.choice))
    assert found.makespan == pytest.approx(makespan(played, found.stays))


def test_what_is_made_and_read_in_the_scratchpad_needs_no_copy() -> None:
    piece = Piece(0, "x", 10, (0, 1), (True, False), made=True, stays=False)
    played = game([{0: 10.0}, {0: 10.0}], [piece], 10)
    assert outcome(played, nothing(played)).makespan == 20
    found = outcome(played, {0: ("no-copy", "no-copy")})
    assert (found.makespan, found.height, found.copied_bytes) == (2, 10, 0)
    # Read from device memory, it must have been copied back: 1 to make it, 10 for the copy, 10 to read it.
    back = outcome(played, {0: ("no-copy", "drop")})
    assert (back.makespan, back.copied_bytes) == (21, 10)


def test_a_copy_runs_beside_the_steps_before_it() -> None:
    given = Piece(0, "w", 10, (1,), (False,), made=False, stays=True)
    other = Piece(1, "y", 12, (0,), (True,), made=True, stays=True)
    played = game([{1: 12.0}, {0: 10.0}], [given, other], 10)
    assert outcome(played, nothing(played)).makespan == 22
    assert outcome(played, {0: ("copy",), 1: ("drop",)}).makespan == 13
    # With nothing before it there is nothing to hide behind.
    alone = game([{0: 10.0}], [Piece(0, "w", 10, (0,), (False,), made=False, stays=True)], 10)
    assert outcome(alone, {0: ("copy",)}).makespan == 11


def test_what_has_no_room_is_dropped() -> None:
    pieces = [Piece(b, f"b{b}", 6, (0, 1), (True, False), made=True, stays=False) for b in range(2)]
    played = game([{0: 6.0, 1: 6.0}] * 2, pieces, 10)
    found = outcome(played, {0: ("no-copy", "no-copy"), 1: ("no-copy", "no-copy")})
    check(played, found)
    assert len(found.stays) == 1


def test_nothing_beats_the_bound_and_little_the_choice() -> None:
    rng = fresh_random()
    for _ in range(12):
        played = random_game(rng)
        found = map_tiers(played, time_limit=2.0)
        for each in (found.best, *found.baselines.values()):
            check(played, each)
            assert found.bound <= each.makespan + 1e-9 and found.best.makespan <= each.makespan
        best = min(
            makespan(played, stays)
            for choice in every_choice(played)
            if crowded(played, stays := stays_of(played, choice)) <= played.capacity
        )
        assert found.bound <= best + 1e-9
        assert found.best.makespan <= best * 1.5


def test_baselines_are_choices_that_fit() -> None:
    rng = fresh_random()
    for _ in range(40):
        played = random_game(rng, pieces=5, turns=8)
        for rule in (best_fit_heap, greedy):
            assert crowded(played, stays_of(played, rule(played))) <= played.capacity
