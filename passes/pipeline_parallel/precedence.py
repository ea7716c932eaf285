"""Which pass waits for which, and for how long after it has ended: what bounds, list schedules and CP-SAT share."""

from __future__ import annotations

from dataclasses import dataclass

from .costs import PipelineCosts
from .schedule import Pass, Schedule, all_passes, needs


@dataclass(frozen=True)
class Problem:
    """Passes with costs, to be ordered. ``shell`` is any schedule of the wanted form (placement, microbatches, split
    backward, vocabulary); its orders do not matter. ``limit``: bytes of activations per rank, None for no limit."""

    shell: Schedule
    costs: PipelineCosts
    limit: tuple[int, ...] | None = None

    @property
    def end_kind(self) -> str:
        """The pass that frees a stage's activations."""
        return self.shell.end_kind

    def kinds(self, rank: int) -> list[tuple[str, int]]:
        """(kind, stage) of all passes of a rank, those of one microbatch."""
        return list(dict.fromkeys((each.kind, each.stage) for each in all_passes(self.shell) if each.microbatch == 0
                                  and self.shell.rank_of(each) == rank))  # fmt: skip

    def waits(self, each: Pass) -> list[tuple[Pass, float]]:
        """The passes that must have ended, each with the seconds of transfer or collective between."""
        return [(need, self._between(need, each)) for need in needs(self.shell, each)]

    def _between(self, need: Pass, each: Pass) -> float:
        schedule, costs = self.shell, self.costs
        collective = 0.0 if schedule.vocabulary == "interlaced" else costs.collective
        if each.kind in ("S", "T") or (need.kind in ("S", "T")):
            return collective
        if need.kind == "E" or each.kind == "D":
            return costs.collective
        if schedule.rank_of(need) == schedule.rank_of(each):
            return 0.0
        return costs.transfer_after(min(need.stage, each.stage))

    def live_limit(self, rank: int) -> int | None:
        """Most microbatches that the rank may hold, where it has one stage; None with several stages or no limit."""
        stages = [stage for stage, owner in enumerate(self.shell.placement) if owner == rank]
        if self.limit is None or len(stages) != 1 or not self.costs.activation or not self.costs.activation[stages[0]]:
            return None
        return self.limit[rank] // self.costs.activation[stages[0]]


def passes_by_microbatch(problem: Problem) -> list[Pass]:
    """All passes so that each stands behind those it waits for, microbatch by microbatch."""
    shell = problem.shell
    back = shell.backward
    order: list[Pass] = []
    for microbatch in range(shell.microbatches):
        ranks = range(shell.ranks)
        if shell.embedding:
            order += [Pass("E", rank, microbatch) for rank in ranks]
        order += [Pass("F", stage, microbatch) for stage in range(shell.stages)]
        if shell.vocabulary:
            order += [Pass(kind, rank, microbatch) for kind in "ST" for rank in ranks]
        order += [Pass(back, stage, microbatch) for stage in reversed(range(shell.stages))]
        if shell.split_backward:
            order += [Pass("W", stage, microbatch) for stage in reversed(range(shell.stages))]
        if shell.embedding:
            order += [Pass("D", rank, microbatch) for rank in ranks]
    return order
