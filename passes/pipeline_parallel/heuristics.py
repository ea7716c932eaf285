"""The best of the published patterns and of list schedules made from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...errors import ScheduleError
from .bounds import lower_bound
from .list_schedule import Urgency, as_in, by_kind, list_schedule, stage_caps
from .precedence import Problem
from .schedule import Schedule
from .simulate import PipelineRun, simulate

#: Orders of urgency by kind: gradients first, the vocabulary's passes first (others wait for their barriers), and
#: forwards before them.
KIND_ORDERS = ("STFIBEWD", "IBSTFEWD", "SIBTFEWD", "IBFSTEWD")


@dataclass(frozen=True)
class Found:
    """A schedule with what the simulator says of it, and the seconds that no schedule can beat."""

    schedule: Schedule
    run: PipelineRun
    bound: float

    @property
    def gap(self) -> float:
        """Relative distance from the bound, 0 when proven best."""
        return max(0.0, 1 - self.bound / self.run.seconds) if self.run.seconds else 0.0


def best_schedule(problem: Problem, patterns: Iterable[Schedule]) -> Found:
    """The fastest that keeps the problem's limit: of the patterns themselves, and of list schedules that hold as many
    microbatches as they do. The patterns must be of the problem's form.

    Raises ScheduleError when none keeps the limit.
    """
    _check_room(problem)
    bound = lower_bound(problem)
    best: tuple[Schedule, PipelineRun] | None = None
    least: int | None = None
    for schedule in _candidates(problem, list(patterns)):
        run = simulate(schedule, problem.costs)
        if not keeps_limit(problem, run):
            least = min(least or max(run.peak), max(run.peak))
            continue
        if best is None or run.seconds < best[1].seconds:
            best = (schedule, run)
            if run.seconds <= bound * (1 + 1e-12):
                break
    if best is None:
        raise ScheduleError(
            f"no schedule of {problem.shell.name} keeps the memory limit"
            + (f"; the least holds {least} bytes" if least else ""),
            remedy="give more memory, or more ranks",
        )
    return Found(*best, min(bound, best[1].seconds))


def _check_room(problem: Problem) -> None:
    """Raises ScheduleError when a rank has no room for one microbatch of each of its stages."""
    for rank in range(problem.shell.ranks if problem.limit is not None and problem.costs.activation else 0):
        stages = [stage for stage, owner in enumerate(problem.shell.placement) if owner == rank]
        least = sum(problem.costs.activation[stage] for stage in stages)
        assert problem.limit is not None
        if least > problem.limit[rank]:
            raise ScheduleError(
                f"rank {rank} needs {least} bytes for one microbatch; its memory limit is {problem.limit[rank]}",
                remedy="give more memory, or more ranks",
            )


def keeps_limit(problem: Problem, run: PipelineRun) -> bool:
    """Whether no rank holds more than its limit, beside what it holds all the time."""
    held = problem.costs.held or (0,) * problem.shell.ranks
    limits = problem.limit
    return limits is None or all(a <= b + c for a, b, c in zip(run.peak, limits, held, strict=True))


def _candidates(problem: Problem, patterns: list[Schedule]) -> Iterator[Schedule]:
    yield from patterns
    if problem.shell.vocabulary == "interlaced":  # its passes stop all ranks at once, which a list does not know
        return
    seen = set()
    for pattern in patterns:
        caps = stage_caps(pattern)
        for variant in _caps_within(problem, caps):
            rules: list[tuple[str, Urgency]] = [(f"list as {pattern.name}", as_in(pattern))]
            rules += [(f"list {kinds}", by_kind(kinds)) for kinds in KIND_ORDERS]
            for name, urgency in rules:
                if (variant, name) in seen:
                    continue
                seen.add((variant, name))
                try:
                    yield list_schedule(problem, variant, urgency, name)
                except ScheduleError:  # these caps leave some stage without room; others may not
                    continue


def _caps_within(problem: Problem, caps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The pattern's own caps, and the largest that the limit allows."""
    shell = problem.shell
    found = [caps]
    if problem.limit is None or not problem.costs.activation:
        found.append((shell.microbatches,) * shell.stages)
        return found
    widest = []
    for stage, rank in enumerate(shell.placement):
        others = [other for other, owner in enumerate(shell.placement) if owner == rank and other != stage]
        room = problem.limit[rank] - sum(problem.costs.activation[other] for other in others)
        widest.append(max(1, min(shell.microbatches, room // max(1, problem.costs.activation[stage]))))
    found.append(tuple(widest))
    return found
