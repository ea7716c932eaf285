"""Which components are fused, and how: the offers of all components as one problem of ``cost_model.schedule_model``.

A component may stay as it is written, become kernels of its own, or be done in chunks of several sizes. Components that
share ops exclude one another, and so do groups that need results of each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ...cost_model.schedule_model import (
    Choice,
    ScheduleAnswer,
    ScheduleProblem,
    Span,
    Way,
    answer_of,
    choose_ways,
    greedy,
)
from ...ir.plan import Alternative, Decision
from .group import Group


@dataclass(frozen=True)
class Offer:
    """One way to fuse a component: predicted seconds of it, and the groups that it makes of ``einsums``. ``wanted``:
    for the memory that it saves, even where it is slower. ``bytes``: of wide tensors that it keeps at once."""

    what: str
    seconds: float
    groups: tuple[Group, ...]
    einsums: frozenset[str]
    wanted: bool = False
    bytes: int = 0


@dataclass(frozen=True)
class Offers:
    """What can be done with a component. ``name``: its largest tensor; ``where``: in the user's model. ``written``:
    seconds as it is written; then ``wide`` bytes are held from line ``first`` to line ``last`` of the graph."""

    name: str
    where: str
    written: float
    wide: int
    first: int
    last: int
    ways: tuple[Offer, ...]

    @property
    def shape(self) -> str:
        """Equal for the components of equal layers."""
        numbers = ((way.what, way.seconds, way.bytes, way.wanted, len(way.groups)) for way in self.ways)
        return repr((self.written, self.wide, *numbers))


#: Whether groups can be run one after the other, each at once.
Runnable = Callable[[Sequence[Group]], bool]


@dataclass(frozen=True)
class FusionAnswer:
    """``taken``: of each component an offer, or None. ``why``: of those that are left although an offer is better."""

    taken: tuple[Offer | None, ...]
    why: tuple[str, ...]
    answer: ScheduleAnswer
    decisions: tuple[Decision, ...]


def choose_offers(found: Sequence[Offers], runnable: Runnable) -> FusionAnswer:
    """The offers that take least time together."""
    problem = ScheduleProblem(tuple(_choice(each) for each in found))

    def circle(taken: Sequence[int]) -> Collection[int]:
        """Components whose groups wait for each other: as few as leaving out one after the other makes them."""
        inside = [number for number, way in enumerate(taken) if way]
        if runnable(_groups(found, taken, inside)):
            return ()
        for number in list(inside):
            rest = [each for each in inside if each != number]
            if not runnable(_groups(found, taken, rest)):
                inside = rest
        return inside

    answer = choose_ways(problem, circle)
    taken = tuple(each.ways[way - 1] if way else None for each, way in zip(found, answer.taken, strict=True))
    used = frozenset().union(*(offer.einsums for offer in taken if offer is not None))
    why = tuple(
        "another group has a part of its ops, and saves more"
        if any(way.einsums & used for way in each.ways)
        else "another group needs a part of its results and gives it another"
        for each in found
    )
    return FusionAnswer(taken, why, answer, tuple(_decisions(found, problem, answer, greedy(problem, circle))))


def _groups(found: Sequence[Offers], taken: Sequence[int], inside: Sequence[int]) -> list[Group]:
    return [group for number in inside for group in found[number].ways[taken[number] - 1].groups]


def _choice(offers: Offers) -> Choice:
    """As written first. Where an offer is wanted for its memory, that is worse than all offers, by next to nothing."""
    slowest = max([way.seconds for way in offers.ways if way.wanted], default=0.0)
    aversion = max(0.0, slowest - offers.written) + 1e-6 if slowest else 0.0
    written = Way(
        "as written", offers.written, held=(Span(offers.first, offers.last, offers.wide),), bytes=offers.wide,
        aversion=aversion,
    )  # fmt: skip
    ways = (Way(way.what, way.seconds, way.einsums, bytes=way.bytes) for way in offers.ways)
    return Choice(_subject(offers.name, offers.where), (written, *ways), offers.shape)


def left_as_written(name: str, where: str, written: float, fused: float) -> Decision:
    """A component that would not be faster by enough as one kernel."""
    ways = (Alternative(what="as written", value=written), Alternative(what="one kernel", value=fused))
    return Decision(kind="fusion", subject=_subject(name, where), chosen="as written", alternatives=ways)


def once_each(decisions: Sequence[Decision]) -> list[Decision]:
    """Of those that equal layers share, the first."""
    return list(
        {(each.alternatives, each.subject.rpartition(" at ")[2]): each for each in reversed(decisions)}.values()
    )


def _subject(name: str, where: str) -> str:
    return f"{name} at {where}" if where else name


def _decisions(
    found: Sequence[Offers], problem: ScheduleProblem, answer: ScheduleAnswer, plain: Sequence[int]
) -> list[Decision]:
    """One for each kind of component, and one for all together with the solver's bound."""
    made = []
    keyed = sorted(zip(found, problem.choices, answer.taken, strict=True), key=lambda item: (item[1].like, item[2]))
    for _, alike in itertools.groupby(keyed, key=lambda item: (item[1].like, item[2])):
        same = list(alike)
        _, choice, way = same[0]
        times = f" and {len(same) - 1} like it" if len(same) > 1 else ""
        made.append(
            Decision(
                kind="fusion",
                subject=choice.subject + times,
                chosen=choice.ways[way].what,
                alternatives=tuple(Alternative(what=each.what, value=each.seconds) for each in choice.ways),
            )
        )
    if len(found) > 0:
        written = answer_of(problem, [0] * len(found), 0.0)
        ways = {"as written": written.seconds, "what saves most first": answer_of(problem, plain, 0.0).seconds}
        ways["together"] = answer.seconds
        made.append(
            Decision(
                kind="fusion",
                subject=f"{len(found)} components as one model",
                chosen="together",
                alternatives=tuple(Alternative(what=what, value=value) for what, value in ways.items()),
                bound=answer.bound,
            )
        )
    return made
