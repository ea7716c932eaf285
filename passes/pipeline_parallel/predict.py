"""Iteration time, peak memory and bubble of a measured pipeline's row, from its stage times or from its shape."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from ...cost_model.collectives import collective_cost
from ...cost_model.devices import Device
from .classic import one_forward_one_backward
from .costs import PipelineCosts
from .rows import PipelineRow, StageTimes
from .schedule import Schedule
from .shapes import OPTIMIZER_TRAFFIC, StageMemory, parameters, stage_memory
from .simulate import PipelineRun, simulate
from .vocabulary import vocabulary_1f1b

#: What a rank loses around a pass that receives and sends: the host issues the exchange, waits and launches again. Mean
#: of what the four unbalanced rows of the published measurements (eight A100, NCCL) leave when their stage times, fill
#: and optimizer are taken off, over two passes a microbatch; other methods' rows had no part in it.
EXCHANGE_SECONDS = 2.0e-4
#: Share of S in S + T by matrix products: one of three, or with one barrier two of three.
_S_SHARE = {"vocab-1": 1 / 3, "vocab-2": 2 / 3, "interlaced": 1 / 3}
_VOCABULARY = {"vocab-1": "two-barriers", "vocab-2": "one-barrier", "interlaced": "interlaced"}


@dataclass(frozen=True)
class Prediction:
    """``seconds`` of an iteration, ``peak`` bytes that the allocator of the fullest rank holds."""

    row: PipelineRow
    seconds: float
    peak: float
    bubble: float
    run: PipelineRun
    schedule: Schedule


def predict(
    row: PipelineRow, times: StageTimes, device: Device, exchange: float = EXCHANGE_SECONDS, reserve: float = 0.0
) -> Prediction:
    """Simulate the row's schedule with these stage times. ``reserve``: bytes that the allocator holds beyond what is
    counted, as a calibration row shows."""
    schedule = row_schedule(row, times)
    memory = stage_memory(row)
    run = simulate(schedule, row_costs(row, times, device, memory, exchange))
    peak = max(live + copies for live, copies in zip(run.peak, memory.copies, strict=True))
    return Prediction(row, run.seconds, peak + reserve, run.bubble, run, schedule)


def row_schedule(row: PipelineRow, times: StageTimes) -> Schedule:
    """The schedule of the row's method."""
    if not row.sharded:
        return one_forward_one_backward(row.ranks, row.microbatches)
    share = _S_SHARE[row.method]
    output = statistics.fmean(times.output)
    lengths = {
        "F": statistics.fmean(times.forward), "B": statistics.fmean(times.backward),
        "S": share * output, "T": (1 - share) * output,
    }  # fmt: skip
    return vocabulary_1f1b(row.ranks, row.microbatches, _VOCABULARY[row.method], embedding=True, lengths=lengths)


def row_costs(
    row: PipelineRow, times: StageTimes, device: Device, memory: StageMemory, exchange: float
) -> PipelineCosts:
    message = 2 * row.tokens * row.hidden
    share = _S_SHARE.get(row.method, 0.0)
    rate = device.bandwidth * device.efficiency_of("memory")
    return PipelineCosts(
        forward=times.forward,
        backward=times.backward,
        output=tuple((share * value, (1 - share) * value) for value in times.output) if row.sharded else (),
        embedding=tuple(zip(times.embedding, times.embedding_gradient, strict=True)) if row.sharded else (),
        transfer=collective_cost("send", message, 2, device).seconds if row.ranks > 1 else 0.0,
        collective=max(times.collective),
        exchange=exchange,
        finish=tuple(count * OPTIMIZER_TRAFFIC / rate for count in parameters(row)),
        activation=memory.activation,
        output_activation=memory.output if row.sharded else (),
        held=memory.held,
    )
