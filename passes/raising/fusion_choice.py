"""Which components are fused, and how: the offers of all components as one problem of ``cost_model.schedule_model``.

A component may stay as it is written, become kernels of its own, or be done in chunks of several sizes. Components that
share ops exclude one another, and so do groups that need results of each other. How each kernel is generated (tiles,
parts, one or two) is a choice of the same problem, made where the kernel is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import msgspec

from ...cost_model.schedule_model import (
    Choice,
    Part,
    ScheduleAnswer,
    ScheduleProblem,
    Span,
    Way,
    choose_ways,
    greedy,
    time_of,
)
from ...cost_model.tile_cost import KernelVariant
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


#: The ways to generate a group's kernel, those of the generator's own rules first; none where there is no choice.
Variants = Callable[[Group], Sequence[KernelVariant]]
#: Whether groups can be run one after the other, each at once.
Runnable = Callable[[Sequence[Group]], bool]


@dataclass(frozen=True)
class FusionAnswer:
    """``taken``: of each component an offer, or None. ``why``: of those that are left although an offer is better."""

    taken: tuple[Offer | None, ...]
    why: tuple[str, ...]
    answer: ScheduleAnswer
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class _Kernel:
    """A kernel's place: group ``group`` of way ``part.way`` of component ``part.choice``, its variants, and its share
    of the way's seconds, by the prices of the rules' variants."""

    part: Part
    group: int
    variants: tuple[KernelVariant, ...]
    seconds: float


def choose_offers(found: Sequence[Offers], runnable: Runnable, variants: Variants | None = None) -> FusionAnswer:
    """The offers that take least time together, their kernels generated in the ways that do."""
    kernels = _kernels(found, variants) if variants is not None else []
    problem = ScheduleProblem((*(_choice(each) for each in found), *(_kernel_choice(found, each) for each in kernels)))

    def circle(taken: Sequence[int]) -> Collection[int]:
        """Components whose groups wait for each other: as few as leaving out one after the other makes them."""
        inside = [number for number, way in enumerate(taken[: len(found)]) if way]
        if runnable(_groups(found, taken, inside)):
            return ()
        for number in list(inside):
            rest = [each for each in inside if each != number]
            if not runnable(_groups(found, taken, rest)):
                inside = rest
        return inside

    answer = choose_ways(problem, circle)
    taken = tuple(each.ways[way - 1] if way else None for each, way in zip(found, answer.taken, strict=False))
    for kernel, way in zip(kernels, answer.taken[len(found) :], strict=True):
        offer = taken[kernel.part.choice]
        if way and offer is not None:
            scheduled = _scheduled(offer, kernel.group, kernel.variants[way - 1])
            taken = (*taken[: kernel.part.choice], scheduled, *taken[kernel.part.choice + 1 :])
    used = frozenset().union(*(offer.einsums for offer in taken if offer is not None))
    why = tuple(
        "another group has a part of its ops, and saves more"
        if any(way.einsums & used for way in each.ways)
        else "another group needs a part of its results and gives it another"
        for each in found
    )
    made = _decisions(found, problem, answer, greedy(problem, circle))
    return FusionAnswer(taken, why, answer, (*made, *_kernel_decisions(found, kernels, answer)))


def _kernels(found: Sequence[Offers], variants: Variants) -> list[_Kernel]:
    """Those that can be generated in several ways. Equal kernels are looked at once."""
    known: dict[str, tuple[KernelVariant, ...]] = {}
    kernels = []
    for number, offers in enumerate(found):
        for way, offer in enumerate(offers.ways, start=1):
            own = []
            for group in offer.groups:
                key = repr(group.fused)
                if key not in known:
                    known[key] = tuple(variants(group))
                own.append(known[key])
            rules = sum(each[0].seconds for each in own if each)
            for position, each in enumerate(own):
                if len(each) > 1 and rules > 0:
                    share = each[0].seconds / rules * offer.seconds
                    kernels.append(_Kernel(Part(number, way), position, each, share))
    return kernels


def _kernel_choice(found: Sequence[Offers], kernel: _Kernel) -> Choice:
    """What each variant changes of the time that the rules' kernel takes: the same share as of its price. It has to be
    faster by what its price is not told apart from the rules' below."""
    offers, rule = found[kernel.part.choice], kernel.variants[0]
    ways = []
    for each in kernel.variants:
        held = (Span(offers.first, offers.last, each.bytes),)
        change = kernel.seconds * (each.seconds / rule.seconds - 1)
        ways.append(Way(each.what, change, frozenset(), held, each.bytes, each.alike * kernel.seconds))
    ways[0] = replace(ways[0], aversion=0.0)
    like = f"{offers.shape} kernel {kernel.group} of way {kernel.part.way}: {rule.what}"
    subject = f"kernel {kernel.group + 1} of {_subject(offers.name, offers.where)}"
    return Choice(subject, (Way("not made", 0.0), *ways), like, kernel.part)


def _scheduled(offer: Offer, position: int, variant: KernelVariant) -> Offer:
    group = offer.groups[position]
    changed = replace(group, fused=replace(group.fused, schedule=dict(variant.schedule)))
    return replace(offer, groups=(*offer.groups[:position], changed, *offer.groups[position + 1 :]))


def _kernel_decisions(found: Sequence[Offers], kernels: Sequence[_Kernel], answer: ScheduleAnswer) -> list[Decision]:
    """One for each kind of kernel that is made, with the price of every variant."""
    made: dict[tuple[str, int, int], list[Decision]] = {}
    for kernel, way in zip(kernels, answer.taken[len(found) :], strict=True):
        if not way:
            continue
        offers = found[kernel.part.choice]
        decision = Decision(
            kind="kernel",
            subject=f"kernel {kernel.group + 1} of {_subject(offers.name, offers.where)}",
            chosen=kernel.variants[way - 1].what,
            alternatives=tuple(
                Alternative(what=each.what, value=each.seconds, measured=each.measured) for each in kernel.variants
            ),
            bound=min(each.seconds for each in kernel.variants),
        )
        made.setdefault((offers.shape, kernel.part.way, kernel.group), []).append(decision)
    return [
        _renamed(alike[0], f"{alike[0].subject} and {len(alike) - 1} like it") if len(alike) > 1 else alike[0]
        for alike in made.values()
    ]


def _renamed(decision: Decision, subject: str) -> Decision:
    return msgspec.structs.replace(decision, subject=subject)


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
    listed = zip(found, problem.choices, answer.taken, strict=False)
    keyed = sorted(listed, key=lambda item: (item[1].like, item[2]))
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
        choices = {"as written": [0] * len(problem.choices), "what saves most first": plain, "together": answer.taken}
        seconds = {what: time_of(problem, taken) for what, taken in choices.items()}
        slower = _slower(problem, answer.taken, len(found))
        why = f", {slower} of them fused for the memory that it saves though it is slower" if slower else ""
        made.append(
            Decision(
                kind="fusion",
                subject=f"{len(found)} components as one model{why}",
                chosen="together",
                alternatives=tuple(Alternative(what=what, value=value) for what, value in seconds.items()),
                # Whatever is as averse as the answer, or less, takes no fewer seconds than this.
                bound=max(0.0, answer.bound - (answer.seconds - seconds["together"])),
            )
        )
    return made


def _slower(problem: ScheduleProblem, taken: Sequence[int], components: int) -> int:
    """How many components are made kernels of although they are faster as they are written."""
    seconds = [problem.choices[number].ways[taken[number]].seconds for number in range(components)]
    for choice, way in zip(problem.choices, taken, strict=True):
        if choice.part is not None:
            seconds[choice.part.choice] += choice.ways[way].seconds
    return sum(
        way > 0 and each > choice.ways[0].seconds
        for choice, way, each in zip(problem.choices, taken, seconds, strict=False)
    )
