"""A schedule with its costs as steps of the plan, and their timeline.

Every rank has a compute stream that runs its passes in the schedule's order, a stream for sends to each neighbour, and
one for each kind of collective, so that transfers overlap with compute. Collectives of a mesh's other axes begin with
their pass, on streams of their own. A barrier is a collective whose steps begin
together on all ranks. Where the pipeline has replicas, one of them is simulated: all do the same at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...cost_model.simulator import Timeline
from ...cost_model.simulator import simulate as run_steps
from ...ir.plan import Buffer, Step
from .costs import PipelineCosts
from .schedule import Pass, Schedule, topological

#: Streams of the collectives.
OUTPUT_INPUT, OUTPUT_BARRIER, OUTPUT_GRADIENT, EMBEDDING, EMBEDDING_GRADIENT = (
    "output input", "output barrier", "output gradient", "embedding", "embedding gradient",
)  # fmt: skip
#: Stream of the sums of gradients over the replicas of a pipeline.
REPLICAS = "replicas"


@dataclass(frozen=True)
class PipelineRun:
    """What the simulator says. ``seconds``: the iteration. ``compute`` and ``bubble`` per rank: seconds of work, and
    the share of the iteration without. ``peak``: bytes per rank. ``live``: most live microbatches of any stage, per
    rank."""

    seconds: float
    compute: tuple[float, ...]
    peak: tuple[int, ...]
    live: tuple[int, ...]
    timeline: Timeline
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they do not compute."""
        return 1 - sum(self.compute) / (len(self.compute) * self.seconds) if self.seconds else 0.0


def simulate(schedule: Schedule, costs: PipelineCosts) -> PipelineRun:
    """Run a schedule. Raises ScheduleError for one that cannot run, or costs that do not fit it."""
    steps, buffers = plan_steps(schedule, costs)
    timeline = run_steps(steps, buffers)
    ranks = range(schedule.ranks)
    compute = tuple(timeline.streams[rank, "compute"].busy for rank in ranks)
    held = costs.held or (0,) * schedule.ranks
    peak = tuple(timeline.peak("device", rank) + held[rank] for rank in ranks)
    live = _live(schedule, steps, timeline)
    return PipelineRun(timeline.makespan, compute, peak, live, timeline, tuple(steps), tuple(buffers))


def plan_steps(schedule: Schedule, costs: PipelineCosts) -> tuple[list[Step], list[Buffer]]:
    """The steps of all ranks, each before those that depend on it, and the buffers that they hold."""
    costs.check(schedule)
    builder = _Builder(schedule, costs)
    for each in topological(schedule):
        builder.add(each)
    builder.finish()
    return builder.steps, builder.buffers()


class _Builder:
    def __init__(self, schedule: Schedule, costs: PipelineCosts) -> None:
        self.schedule, self.costs = schedule, costs
        self.steps: list[Step] = []
        self.ids: dict[Pass, int] = {}
        #: (pass, rank that waits) -> step that brings it what it waits for.
        self.arrivals: dict[tuple[Pass, int], int] = {}
        self.meetings: dict[tuple[str, int], list[int]] = {}
        self.last_of: dict[int, int] = {}
        self.sums: dict[int, list[int]] = {}

    def add(self, each: Pass) -> None:
        schedule, (kind, stage, microbatch) = self.schedule, each
        rank = schedule.rank_of(each)
        together = schedule.vocabulary == "interlaced" and kind in ("S", "T")
        identity = self._step(
            str(each), rank, "compute", self.costs.seconds(each), self._waits_for(each),
            kind="region", rendezvous=f"{kind}{microbatch}" if together else "",
        )  # fmt: skip
        self.ids[each] = identity
        waits = self.steps[identity].depends + ((self.last_of[rank],) if rank in self.last_of else ())
        for stream, seconds in self.costs.collectives(each):
            self._step(f"{stream} of {each}", rank, stream, seconds, waits)
        self.last_of[rank] = identity
        back = schedule.backward
        if kind == "F" and stage < schedule.last:
            self._send(each, Pass("F", stage + 1, microbatch))
        elif kind == back and stage:
            self._send(each, Pass(back, stage - 1, microbatch))
        if kind == "F" and stage == schedule.last and schedule.vocabulary:
            # Where all ranks run S together, its time has the collectives in it.
            seconds = 0.0 if schedule.vocabulary == "interlaced" else self.costs.collective
            self.meetings["X", microbatch] = [self._step(f"X{microbatch}", rank, OUTPUT_INPUT, seconds, (identity,))]
        if kind == back and stage == 0 and schedule.embedding:
            self.meetings["D", microbatch] = [
                self._step(f"dX{microbatch}", rank, EMBEDDING_GRADIENT, self.costs.collective, (identity,))
            ]

    def _waits_for(self, each: Pass) -> tuple[int, ...]:
        schedule, (kind, stage, microbatch) = self.schedule, each
        rank = schedule.rank_of(each)
        found: list[int] = []
        if (each, rank) in self.arrivals:
            found.append(self.arrivals[each, rank])
        if kind in ("B", "I"):
            found.append(self.ids[Pass("F", stage, microbatch)])
            if stage == schedule.last and schedule.vocabulary == "interlaced":
                found.append(self.ids[Pass("T", rank, microbatch)])
            elif stage == schedule.last and schedule.vocabulary:
                kind_before = "S" if schedule.vocabulary == "one-barrier" else "T"
                stream = OUTPUT_BARRIER if kind_before == "S" else OUTPUT_GRADIENT
                found.append(self._meet(kind_before, stream, microbatch)[rank])
        elif kind == "W":
            found.append(self.ids[Pass("I", stage, microbatch)])
        elif kind == "S":
            found += self.meetings["X", microbatch]
        elif kind == "T":
            if schedule.vocabulary == "interlaced":
                found.append(self.ids[Pass("S", rank, microbatch)])
            else:
                found.append(self._meet("S", OUTPUT_BARRIER, microbatch)[rank])
        elif kind == "F" and stage == 0 and schedule.embedding:
            found.append(self._meet("E", EMBEDDING, microbatch)[rank])
        elif kind == "D":
            found += self.meetings["D", microbatch]
        return tuple(found)

    def _send(self, each: Pass, consumer: Pass) -> None:
        """What the consumer waits for: the pass itself, or a transfer to its rank."""
        source, target = self.schedule.rank_of(each), self.schedule.rank_of(consumer)
        identity = self.ids[each]
        if source != target:
            name = f"{each} to rank {target}"
            seconds = self.costs.transfer_after(min(each.stage, consumer.stage))
            identity = self._step(name, source, f"to rank {target}", seconds, (identity,))
        self.arrivals[consumer, target] = identity

    def _meet(self, kind: str, stream: str, microbatch: int) -> list[int]:
        """The collective that all ranks enter after their pass ``kind`` of a microbatch; its step on each rank."""
        if (kind, microbatch) not in self.meetings:
            self.meetings[kind, microbatch] = [
                self._step(
                    f"{stream} {microbatch}", rank, stream, self.costs.collective,
                    (self.ids[Pass(kind, rank, microbatch)],), rendezvous=f"{stream} {microbatch}",
                )
                for rank in range(self.schedule.ranks)
            ]  # fmt: skip
        return self.meetings[kind, microbatch]

    def _step(
        self, name: str, rank: int, stream: str, seconds: float, depends: tuple[int, ...], *,
        kind: str = "collective", rendezvous: str = "",
    ) -> int:  # fmt: skip
        identity = len(self.steps)
        phase = "forward" if name.lstrip("0123456789")[:1] in "FSE" else "backward"
        self.steps.append(
            Step(
                id=identity, kind=kind, name=name, phase=phase, stream=stream, device=rank, seconds=seconds,
                depends=depends, rendezvous=rendezvous,
            )
        )  # fmt: skip
        return identity

    def finish(self) -> None:
        """The sums of gradients over replicas, in the order in which passes complete them; then the optimizer, on all
        ranks once the last has its gradients: their norm is taken over all."""
        schedule = self.schedule
        for rank, order in enumerate(schedule.orders):
            last = {(each.kind, each.stage): each for each in order}
            for each in (each for each in order if last[each.kind, each.stage] is each):
                seconds = self.costs.sum_seconds(each, schedule.end_kind)
                if seconds:
                    what = {"T": "output layer", "D": "embedding"}.get(each.kind, f"stage {each.stage}")
                    name = f"gradients of {what}" + (f" of rank {rank}" if each.kind in "TD" else "")
                    made = self._step(name, rank, REPLICAS, seconds, (self.ids[each],))
                    self.sums.setdefault(rank, []).append(made)
        for rank, seconds in enumerate(self.costs.finish):
            identity = len(self.steps)
            self.steps.append(
                Step(
                    id=identity, kind="optimizer", name="optimizer", phase="optimizer", device=rank, seconds=seconds,
                    depends=(self.last_of[rank], *self.sums.get(rank, ())), rendezvous="optimizer",
                )
            )  # fmt: skip

    def buffers(self) -> list[Buffer]:
        """What microbatches hold. A buffer's steps lie on its rank, which is how the simulator knows where it is."""
        found: list[Buffer] = []
        touched: dict[int, list[tuple[str, int]]] = {}

        def hold(name: str, size: int, first: Pass, end: Pass) -> None:
            identity = len(found)
            low, high = self.ids[first], self.ids[end]
            found.append(Buffer(id=identity, name=name, bytes=size, lower=low, upper=high + 1, role="saved"))
            touched.setdefault(low, []).append(("writes", identity))
            touched.setdefault(high, []).append(("frees", identity))

        schedule = self.schedule
        end_kind = schedule.end_kind
        for microbatch in range(schedule.microbatches):
            for stage, size in enumerate(self.costs.activation):
                hold(
                    f"activations {stage}.{microbatch}", size, Pass("F", stage, microbatch),
                    Pass(end_kind, stage, microbatch),
                )  # fmt: skip
            if schedule.vocabulary:
                for rank, size in enumerate(self.costs.output_activation):
                    hold(f"logits {rank}.{microbatch}", size, Pass("S", rank, microbatch), Pass("T", rank, microbatch))
        import msgspec

        for index, parts in touched.items():
            changes = {key: tuple(identity for name, identity in parts if name == key) for key in ("writes", "frees")}
            self.steps[index] = msgspec.structs.replace(self.steps[index], **changes)
        return found


def _live(schedule: Schedule, steps: list[Step], timeline: Timeline) -> tuple[int, ...]:
    """Most microbatches of one stage that are live at once on each rank."""
    end_kind = schedule.end_kind
    events: dict[int, list[tuple[float, int]]] = {stage: [] for stage in range(schedule.stages)}
    for index, step in enumerate(steps):
        stage, kind = _stage_and_kind(step)
        if kind == "F":
            events[stage].append((timeline.start[index], 1))
        elif kind == end_kind:
            events[stage].append((timeline.end[index], -1))
    most = [0] * schedule.ranks
    for stage, changes in events.items():
        live = 0
        for _, change in sorted(changes):
            live += change
            most[schedule.placement[stage]] = max(most[schedule.placement[stage]], live)
    return tuple(most)


def _stage_and_kind(step: Step) -> tuple[int, str]:
    if step.kind != "region":
        return -1, ""
    stage = step.name.rstrip("0123456789")
    return int(stage[:-1]), stage[-1]
