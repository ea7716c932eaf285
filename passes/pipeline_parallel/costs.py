"""What a schedule's passes, transfers and memory cost. All times are seconds, all sizes bytes."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ScheduleError
from .schedule import Pass, Schedule


@dataclass(frozen=True)
class PipelineCosts:
    """Costs of one schedule on one group of ranks.

    ``forward`` and ``backward`` are per virtual stage; ``weight`` is the part of ``backward`` that W takes where it is
    split (half of it, if empty). ``output`` are (S, T), ``embedding`` (E, D) per rank. ``transfer`` moves an activation
    or its gradient to another rank; ``transfers`` where it is not the same between all stages: one a pair of
    neighbouring virtual stages. ``collective`` is one collective of the vocabulary layers. ``exchange`` is what a
    rank loses around each pass that receives and sends: issuing, waiting, waking up. ``finish`` follows the last pass,
    per rank: the optimizer.

    ``gradient``: adding up the gradients of a virtual stage over the replicas of the pipeline, after the last pass that
    makes them and beside later ones. ``shard_gradient``: the same for the sharded matrices of the vocabulary, after the
    last T and the last D of a rank.

    ``beside``: per virtual stage (stream, seconds in a forward, seconds in a backward) of collectives that run while a
    pass does: those of other axes of the mesh. What of them kernels do not hide is part of the pass.

    ``activation``: what a microbatch holds between F and the end of its backward, per virtual stage.
    ``output_activation``: what it holds between S and the end of T, per rank. ``held``: what is held all the time, per
    rank.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...] = ()
    output: tuple[tuple[float, float], ...] = ()
    embedding: tuple[tuple[float, float], ...] = ()
    transfer: float = 0.0
    transfers: tuple[float, ...] = ()
    collective: float = 0.0
    exchange: float = 0.0
    finish: tuple[float, ...] = ()
    gradient: tuple[float, ...] = ()
    shard_gradient: tuple[float, float] = (0.0, 0.0)
    beside: tuple[tuple[tuple[str, float, float], ...], ...] = ()
    activation: tuple[int, ...] = ()
    output_activation: tuple[int, ...] = ()
    held: tuple[int, ...] = ()

    def seconds(self, each: Pass) -> float:
        """Length of a pass on its rank, with the exchange around it."""
        kind, stage, _ = each
        if kind == "F":
            return self.forward[stage] + self.exchange
        if kind == "B":
            return self.backward[stage] + self.exchange
        if kind in ("I", "W"):
            weight = self.weight[stage] if self.weight else self.backward[stage] / 2
            return weight if kind == "W" else self.backward[stage] - weight + self.exchange
        if kind in ("S", "T"):
            return self.output[stage][kind == "T"]
        return self.embedding[stage][kind == "D"]

    def transfer_after(self, stage: int) -> float:
        """Seconds between a virtual stage and the next one, in either direction."""
        return self.transfers[stage] if self.transfers else self.transfer

    def collectives(self, each: Pass) -> list[tuple[str, float]]:
        """(stream, seconds) of what runs beside a pass. A backward's belong to I where it is split."""
        if not self.beside or each.kind not in ("F", "B", "I"):
            return []
        found = [(stream, backward if each.kind in ("B", "I") else forward)
                 for stream, forward, backward in self.beside[each.stage]]  # fmt: skip
        return [(stream, seconds) for stream, seconds in found if seconds]

    def sum_seconds(self, each: Pass, end_kind: str) -> float:
        """Adding up over the replicas what the last pass of this kind and stage completes."""
        if each.kind == end_kind:
            return self.gradient[each.stage] if self.gradient else 0.0
        return self.shard_gradient["TD".index(each.kind)] if each.kind in ("T", "D") else 0.0

    def check(self, schedule: Schedule) -> None:
        """Raises ScheduleError when the costs are not those of this schedule's stages and ranks."""
        stages, ranks = schedule.stages, schedule.ranks
        wanted: dict[str, tuple[int, bool]] = {
            "forward": (stages, True), "backward": (stages, True), "weight": (stages, False),
            "output": (ranks, bool(schedule.vocabulary)), "embedding": (ranks, schedule.embedding),
            "finish": (ranks, False), "transfers": (stages - 1, False), "gradient": (stages, False),
            "beside": (stages, False),
            "activation": (stages, False), "output_activation": (ranks, False), "held": (ranks, False),
        }  # fmt: skip
        for name, (count, required) in wanted.items():
            given = len(getattr(self, name))
            if given != count and (given or required):
                raise ScheduleError(
                    f"{schedule.name} has {stages} stages on {ranks} ranks; the costs give {given} values of {name}",
                    remedy=f"give {count}",
                )


def uniform_costs(
    schedule: Schedule,
    *,
    forward: float = 1.0,
    backward: float = 2.0,
    output: tuple[float, float] = (0.5, 0.5),
    embedding: tuple[float, float] = (0.1, 0.1),
    transfer: float = 0.0,
    collective: float = 0.0,
) -> PipelineCosts:
    """Costs that are the same on all ranks; a rank's stages share ``forward`` and ``backward`` evenly."""
    chunks = schedule.stages // schedule.ranks
    return PipelineCosts(
        forward=(forward / chunks,) * schedule.stages,
        backward=(backward / chunks,) * schedule.stages,
        output=(output,) * schedule.ranks if schedule.vocabulary else (),
        embedding=(embedding,) * schedule.ranks if schedule.embedding else (),
        transfer=transfer,
        collective=collective,
        activation=(1,) * schedule.stages,
    )
