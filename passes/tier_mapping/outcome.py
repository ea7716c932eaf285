"""What a choice comes to: where its pieces lie in the scratchpad, and how long the steps take with their copies."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...cost_model.offset_assignment.problem import Problem
from ...cost_model.offset_assignment.solver import solve
from ...cost_model.simulator import simulate
from ...ir.plan import Step
from .game import DROP, Choice, Game, Piece


@dataclass(frozen=True)
class Stay:
    """A piece in the scratchpad from step ``first`` to ``last``, for its uses ``begin`` to ``end`` (both counted).
    ``copied``: it is copied in; ``written``: the last use that writes it there, after which it is copied back, or
    -1."""

    piece: Piece
    begin: int
    end: int
    first: int
    last: int
    copied: bool
    written: int = -1


@dataclass(frozen=True)
class Outcome:
    """``offsets`` belong to ``stays``; ``height`` is the scratchpad in use."""

    choice: Choice
    stays: tuple[Stay, ...]
    offsets: tuple[int, ...]
    height: int
    makespan: float

    @property
    def copied_bytes(self) -> int:
        return sum(stay.piece.bytes * (stay.copied + (stay.written >= 0)) for stay in self.stays)


def nothing(game: Game) -> Choice:
    """Everything in device memory."""
    return {piece.id: (DROP,) * len(piece.uses) for piece in game.pieces}


def stays_of(game: Game, choice: Choice) -> list[Stay]:
    """The stays that a choice makes, in the order of their pieces."""
    found: list[Stay] = []
    for piece in game.pieces:
        fates = choice[piece.id]
        begin = None
        for use, fate in enumerate((*fates, "drop")):
            if begin is not None and fate != "no-copy":
                copied = fates[begin] == "copy"
                first = game.prefetch(piece, begin) if copied else piece.uses[begin]
                written = max((u for u in range(begin, use) if piece.writes[u]), default=-1)
                if use == len(fates) and not piece.stays:
                    written = -1
                found.append(Stay(piece, begin, use - 1, first, piece.uses[use - 1], copied, written))
                begin = None
            if fate == "copy" or (fate == "no-copy" and begin is None):
                begin = use
    return found


def crowded(game: Game, stays: Sequence[Stay]) -> int:
    """Most bytes in the scratchpad at a time."""
    change = [0] * (len(game.turns) + 1)
    for stay in stays:
        change[stay.first] += game.room(stay.piece)
        change[stay.last + 1] -= game.room(stay.piece)
    return int(np.cumsum(change).max(initial=0))


def outcome(game: Game, choice: Choice, *, time_limit: float = 1.0, seed: int = 0) -> Outcome:
    """Offsets and makespan of a choice. Stays that find no place are dropped, those that save least a byte first."""
    while True:
        stays = stays_of(game, choice)
        if not stays:
            return Outcome(choice, (), (), 0, makespan(game, ()))
        if crowded(game, stays) <= game.capacity:
            lower = np.array([stay.first for stay in stays], np.int64)
            upper = np.array([stay.last + 1 for stay in stays], np.int64)
            size = np.array([stay.piece.bytes for stay in stays], np.int64)
            problem = Problem(lower, upper, size, np.full(len(stays), game.alignment, np.int64))
            found = solve(problem, game.capacity, time_limit=time_limit, seed=seed)
            if found.height <= game.capacity:
                return Outcome(choice, tuple(stays), tuple(found.offsets.tolist()), found.height, makespan(game, stays))
        worst = min(stays, key=lambda stay: (benefit(game, stay), stay.piece.id))
        choice = without(choice, worst)


def benefit(game: Game, stay: Stay) -> float:
    """Seconds that a stay saves for a byte and step that it takes."""
    saved = sum(game.saving(stay.piece.uses[use], stay.piece.id) for use in range(stay.begin, stay.end + 1))
    return saved / (game.room(stay.piece) * (1 + stay.last - stay.first))


def without(choice: Choice, stay: Stay) -> Choice:
    fates = list(choice[stay.piece.id])
    fates[stay.begin : stay.end + 1] = ["drop"] * (1 + stay.end - stay.begin)
    return {**choice, stay.piece.id: tuple(fates)}


def makespan(game: Game, stays: Sequence[Stay]) -> float:
    """Seconds of all steps with the copies that ``stays`` need, by the simulator: copies in and out have an engine
    each; a step waits for what is copied in for it; a copy in, and a step that reads from device memory, for the copy
    back before."""
    inside: list[set[int]] = [set() for _ in game.turns]
    arrivals: dict[int, list[Stay]] = {}
    leaving: dict[int, list[Stay]] = {}
    for stay in stays:
        for use in range(stay.begin, stay.end + 1):
            inside[stay.piece.uses[use]].add(stay.piece.id)
        if stay.copied:
            arrivals.setdefault(stay.first, []).append(stay)
        if stay.written >= 0:
            leaving.setdefault(stay.piece.uses[stay.written], []).append(stay)
    steps: list[Step] = []
    waits: dict[int, list[int]] = {}
    out: dict[int, int] = {}
    make = functools.partial(Step, phase="forward")
    before: tuple[int, ...] = ()
    for position, turn in enumerate(game.turns):
        for stay in sorted(arrivals.get(position, ()), key=lambda s: (s.piece.uses[s.begin], s.piece.id)):
            left = (out[stay.piece.id],) if stay.piece.id in out else ()
            seconds = game.copy_seconds(stay.piece.bytes)
            steps.append(
                make(id=len(steps), kind="swap_in", name=stay.piece.name, stream="copy in", depends=before + left,
                     seconds=seconds)
            )  # fmt: skip
            waits.setdefault(stay.piece.uses[stay.begin], []).append(steps[-1].id)
        seconds = game.seconds(turn, frozenset(inside[position]))
        outside = (out[b] for b in turn.traffic if b in out and b not in inside[position])
        depends = tuple(sorted({*waits.get(position, ()), *outside}))
        steps.append(make(id=len(steps), kind="kernel", name=turn.name, depends=depends, seconds=seconds))
        before = (steps[-1].id,)
        for stay in leaving.get(position, ()):
            seconds = game.copy_seconds(stay.piece.bytes)
            steps.append(
                make(id=len(steps), kind="swap_out", name=stay.piece.name, stream="copy out", depends=before,
                     seconds=seconds)
            )  # fmt: skip
            out[stay.piece.id] = steps[-1].id
    return simulate(steps).makespan
