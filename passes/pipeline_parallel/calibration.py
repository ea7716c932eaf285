"""Stage times from a model's shape, with the rates of one measured row.

The calibration row gives seconds of a layer, of the output layer for a token and vocabulary entry, of the exchange
between passes, and the bytes that its allocator held beyond what is counted. What one row cannot show comes from the
device: the traffic of the embedding, and how much slower everything is while collectives wait beside it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from ...cost_model.collectives import collective_cost
from ...cost_model.devices import Device
from ...errors import PipelineDataError
from .predict import EXCHANGE_SECONDS, Prediction, predict
from .rows import Measured, PipelineRow, StageTimes
from .shapes import layer_flop, layers_per_stage

#: NCCL keeps a block for each channel resident while a collective waits for other ranks, and other kernels have as many
#: units less. The collectives of the embedding wait beside them most of the time; so do those of the output layer,
#: unless all ranks run it together.
CHANNELS = 4
#: What a group of many small kernels takes at least (a norm, a loss, a lookup): the host cannot issue it faster.
SHORT_PASS = 2.0e-4
#: Such groups in each direction of an unsharded output layer: the last norm, the product, the loss.
HEAD_PARTS = 3
#: Traffic of the input embedding's gradient, bytes a parameter: zeroed, added to the accumulated one.
EMBEDDING_TRAFFIC = 8


@dataclass(frozen=True)
class Rates:
    """Seconds: of a layer's forward and backward for a FLOP of its forward; of the output layer, forward and backward,
    for one token, one vocabulary entry and one element of the hidden state; of an exchange. ``reserve`` in bytes.
    ``speed``: each rank's time for a layer, relative to the mean: no two devices are equally fast, and the slowest sets
    the pace."""

    row: PipelineRow
    layer_forward: float
    layer_backward: float
    output_forward: float
    output_backward: float
    exchange: float
    reserve: float
    speed: tuple[float, ...]

    def times(self, row: PipelineRow, device: Device) -> StageTimes:
        """Stage times of another row."""
        slower = _slowdown(row, device)
        scale = row.tokens * layer_flop(row) * slower
        counts = layers_per_stage(row)
        speed = self.speed if len(self.speed) == row.ranks else (1.0,) * row.ranks
        forward = [count * self.layer_forward * scale * own for count, own in zip(counts, speed, strict=True)]
        backward = [count * self.layer_backward * scale * own for count, own in zip(counts, speed, strict=True)]
        work = row.tokens * row.vocabulary * row.hidden
        rate = device.bandwidth * device.efficiency_of("memory")
        gradient = row.vocabulary * row.hidden * EMBEDDING_TRAFFIC / rate
        none = (0.0,) * row.ranks
        if not row.sharded:
            forward[-1] += work * self.output_forward + HEAD_PARTS * SHORT_PASS
            backward[-1] += work * self.output_backward + HEAD_PARTS * SHORT_PASS
            backward[0] += gradient
            return StageTimes(tuple(forward), tuple(backward), none, none, none, none)
        output = work / row.ranks * (self.output_forward + self.output_backward) * slower
        output += _output_overhead(row)
        message = 2 * row.tokens * row.hidden
        return StageTimes(
            tuple(forward),
            tuple(backward),
            (output,) * row.ranks,
            (SHORT_PASS + 4 * message / rate,) * row.ranks,
            (SHORT_PASS + gradient / row.ranks + 2 * message / rate,) * row.ranks,
            (_all_reduce(row, device),) * row.ranks,
        )


def calibrate(row: PipelineRow, measured: Measured, device: Device) -> Rates:
    """Rates that make the model give the measured row. Raises PipelineDataError when it has no stage times."""
    times = row.times
    if times is None:
        raise PipelineDataError(
            f"row {row.number} has no stage times to calibrate on", remedy="choose a row that has all its columns"
        )
    slower = _slowdown(row, device)
    counts = layers_per_stage(row)
    inner = [stage for stage in range(row.ranks) if row.sharded or stage not in (0, row.ranks - 1)] or [0]
    layers = sum(counts[stage] for stage in inner)
    forward = sum(times.forward[stage] for stage in inner) / layers / slower
    backward = sum(times.backward[stage] for stage in inner) / layers / slower
    speed = [1.0] * row.ranks
    for stage in inner:
        speed[stage] = (times.forward[stage] + times.backward[stage]) / (counts[stage] * (forward + backward) * slower)
    work = row.tokens * row.vocabulary * row.hidden
    if row.sharded:
        output = max(0.0, statistics.fmean(times.output) - _output_overhead(row)) * row.ranks / slower / work
        # One matrix product of three is the forward's, and most of what is done element by element.
        parts = (output * 0.45, output * 0.55)
    else:
        parts = (
            max(0.0, times.forward[-1] - counts[-1] * forward - HEAD_PARTS * SHORT_PASS) / work,
            max(0.0, times.backward[-1] - counts[-1] * backward - HEAD_PARTS * SHORT_PASS) / work,
        )
    exchange = _exchange(row, times, measured, device)
    found = predict(row, times, device, exchange)
    reserve = measured.peak - found.peak if measured.peak is not None else 0.0
    flop = row.tokens * layer_flop(row)
    return Rates(row, forward / flop, backward / flop, *parts, exchange, reserve, tuple(speed))


def predict_rows(rows: tuple[PipelineRow, ...], device: Device, rates: Rates | None) -> list[Prediction]:
    """Predictions in row order: from each row's own stage times, or with ``rates`` from its shape alone.

    Raises PipelineDataError for a row without stage times when there are no rates.
    """
    found = []
    for row in rows:
        if rates is not None:
            times: StageTimes | None = row.times if row.number == rates.row.number else rates.times(row, device)
        else:
            times = row.times
        if times is None:
            raise PipelineDataError(
                f"row {row.number} has no stage times", remedy="fill in its stage_*_us columns, or use --calibrate-row"
            )
        exchange, reserve = (rates.exchange, rates.reserve) if rates else (EXCHANGE_SECONDS, 0.0)
        found.append(predict(row, times, device, exchange, reserve))
    return found


def _slowdown(row: PipelineRow, device: Device) -> float:
    """How much longer passes take while collectives wait beside them."""
    if not row.sharded or device.kind == "cpu":
        return 1.0
    waiting = 1 if row.method == "interlaced" else 2
    return device.units.value / (device.units.value - waiting * CHANNELS)


def _output_overhead(row: PipelineRow) -> float:
    """What S and T take besides the work that grows with the vocabulary: a short pass each; with one barrier the lookup
    of the targets' weights; where all ranks run them together, one for each collective that interrupts them (the last
    stage's output, maximum, sum, gradient)."""
    return {"vocab-1": 2, "vocab-2": 3, "interlaced": 4}[row.method] * SHORT_PASS


def _exchange(row: PipelineRow, times: StageTimes, measured: Measured, device: Device) -> float:
    """The exchange that explains the measured iteration, not below 0: the iteration is nearly linear in it."""
    low, high = 0.0, 2 * EXCHANGE_SECONDS
    for _ in range(4):
        at_low = predict(row, times, device, low).seconds
        slope = (predict(row, times, device, high).seconds - at_low) / (high - low)
        wanted = low + (measured.seconds - at_low) / slope if slope > 0 else low
        if abs(wanted - low) < 1e-7:
            break
        low, high = max(0.0, wanted), max(0.0, wanted) + EXCHANGE_SECONDS
    return low


def _all_reduce(row: PipelineRow, device: Device) -> float:
    return collective_cost("all_reduce", 2 * row.tokens * row.hidden, row.ranks, device).seconds
