"""Layers, parameters and bytes of the stages of the published 4B model."""

from __future__ import annotations

import pytest
from effcc.cost_model.devices import load_device
from effcc.passes.pipeline_parallel.calibration import calibrate, predict_rows
from effcc.passes.pipeline_parallel.predict import predict
from effcc.passes.pipeline_parallel.rows import Measured, PipelineRow, StageTimes
from effcc.passes.pipeline_parallel.shapes import layers_per_stage, parameters, stage_memory


def row(method: str = "base", vocabulary: int = 32000, times: StageTimes | None = None, number: int = 0) -> PipelineRow:
    return PipelineRow(
        number=number, method=method, vocabulary=vocabulary, sequence=2048, hidden=3072, ffn=12288, layers=32, heads=24,
        ranks=8, microbatches=16, microbatch_size=1, times=times,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("vocabulary", "layers"),
    [
        (256000, (4, 4, 4, 5, 5, 5, 5, 0)),
        (128000, (4, 4, 4, 4, 4, 5, 5, 2)),
        (64000, (4, 4, 4, 4, 4, 4, 5, 3)),
        (32000, (4,) * 8),
    ],
)
def test_redistributed_layers(vocabulary: int, layers: tuple[int, ...]) -> None:
    """As the published stage times show: a layer takes 2.6 ms forward."""
    assert layers_per_stage(row("redis", vocabulary)) == layers
    assert layers_per_stage(row("base", vocabulary)) == (4,) * 8


def test_parameters_and_activations() -> None:
    """About 4 billion parameters; 34 bytes a token and hidden element for each layer (Korthikanti et al., eq. 2, with
    flash attention); the vocabulary's matrices on the first and last rank, or spread."""
    assert 3.7e9 < sum(parameters(row())) < 4.2e9
    for method in ("base", "vocab-1"):
        memory = stage_memory(row(method))
        assert memory.activation[0] == 4 * 34 * 2048 * 3072
    whole, spread = parameters(row()), parameters(row("vocab-2"))
    assert sum(whole) == pytest.approx(sum(spread), rel=1e-6)
    assert whole[0] - whole[1] > 32000 * 3072 > max(spread[1:]) - min(spread[1:])


def test_calibration_gives_back_its_row() -> None:
    """Rates from one row explain that row; a row of twice the work in every layer takes twice as long, roughly."""
    device = load_device("a100-80g")
    ones = (1.0,) * 8
    given = StageTimes(
        (*tuple(0.0106 * value for value in ones[1:]), 0.0146), (*tuple(0.0211 * value for value in ones[1:]), 0.026),
        *((0.0,) * 8,) * 4,
    )  # fmt: skip
    measured = Measured(predict(row(times=given), given, device).seconds * 1.01, 17e9)
    rates = calibrate(row(times=given), measured, device)
    other = row("vocab-1", 64000, number=1)
    found, sharded = predict_rows((row(times=given), other), device, rates)
    assert found.seconds == pytest.approx(measured.seconds, rel=1e-4)
    assert found.peak == pytest.approx(17e9)
    assert 0.7 < sharded.seconds / found.seconds < 1.05
    assert sharded.run.live[0] == 10
